"""The Stable Audio Open autoencoder with random weights, in the published folder layout."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ...codecs.audio_vae import PUBLISHED_CONFIG, PUBLISHED_WEIGHTS, AudioVAE
from ...errors import OutputError
from ...guards.file_paths import atomic_output
from ...model.config import AUDIO_CHANNELS, SAMPLE_RATE
from .files import save_tensors

Shapes = dict[str, tuple[int, ...]]
_PREFIX = "pretransform.model."
_MULTIPLES = (1, 2, 4, 8, 16)
_STRIDES = (2, 4, 4, 8, 8)
_RMS = 0.1  # of the decoded sound, full scale being 1
_PROBE = 16  # latents decoded to find the sound's level
_INPUT_GAIN = 5.0  # sound is quieter than the unit-normal values inside
_BAND_PASS = (-1.0, -2.0, -2.0, 0.0, 2.0, 2.0, 1.0)
_LAST = {part: f"{_PREFIX}{part}.layers.{len(_STRIDES) + 2}" for part in ("encoder", "decoder")}


def audio_vae_shapes(channels: int = 128) -> Shapes:
    """Every autoencoder key of the published `model.safetensors` with its shape (published: 128 channels)."""
    widths = [channels, *(m * channels for m in _MULTIPLES)]
    last = len(_STRIDES) + 1
    encoder, decoder = f"{_PREFIX}encoder.layers", f"{_PREFIX}decoder.layers"
    shapes = _conv(f"{encoder}.0", channels, 2, 7)
    for i, stride in enumerate(_STRIDES):
        into, out = widths[i], widths[i + 1]
        block = f"{encoder}.{i + 1}.layers"
        for j in range(3):
            shapes |= _unit(f"{block}.{j}", into)
        shapes |= _snake(f"{block}.3", into) | _conv(f"{block}.4", out, into, 2 * stride)
    shapes |= _snake(f"{encoder}.{last}", widths[-1])
    shapes |= _conv(f"{encoder}.{last + 1}", 2 * AUDIO_CHANNELS, widths[-1], 3)

    shapes |= _conv(f"{decoder}.0", widths[-1], AUDIO_CHANNELS, 7)
    for i, stride in enumerate(reversed(_STRIDES)):
        into, out = widths[-1 - i], widths[-2 - i]
        block = f"{decoder}.{i + 1}.layers"
        # A transposed convolution stores its input channels first, and its norms are per input channel.
        shapes |= _snake(f"{block}.0", into) | _conv(f"{block}.1", into, out, 2 * stride)
        shapes[f"{block}.1.bias"] = (out,)
        for j in range(2, 5):
            shapes |= _unit(f"{block}.{j}", out)
    shapes |= _snake(f"{decoder}.{last}", channels)
    shapes |= _conv(f"{decoder}.{last + 1}", 2, channels, 7)
    del shapes[f"{decoder}.{last + 1}.bias"]
    return shapes


def _conv(name: str, rows: int, columns: int, kernel: int) -> Shapes:
    return {
        f"{name}.weight_g": (rows, 1, 1),
        f"{name}.weight_v": (rows, columns, kernel),
        f"{name}.bias": (rows,),
    }


def _snake(name: str, channels: int) -> Shapes:
    return {f"{name}.alpha": (channels,), f"{name}.beta": (channels,)}


def _unit(name: str, channels: int) -> Shapes:
    first = _snake(f"{name}.layers.0", channels) | _conv(f"{name}.layers.1", channels, channels, 7)
    return first | _snake(f"{name}.layers.2", channels) | _conv(f"{name}.layers.3", channels, channels, 1)


def model_config(channels: int = 128) -> dict[str, Any]:
    """The published `model_config.json` as far as it concerns the autoencoder."""
    widths = {"channels": channels, "c_mults": list(_MULTIPLES), "strides": list(_STRIDES)}
    encoder = {"in_channels": 2, **widths, "latent_dim": 2 * AUDIO_CHANNELS, "use_snake": True}
    decoder = {
        "out_channels": 2,
        **widths,
        "latent_dim": AUDIO_CHANNELS,
        "use_snake": True,
        "final_tanh": False,
    }
    autoencoder = {
        "encoder": {"type": "oobleck", "requires_grad": False, "config": encoder},
        "decoder": {"type": "oobleck", "config": decoder},
        "bottleneck": {"type": "vae"},
        "latent_dim": AUDIO_CHANNELS,
        "downsampling_ratio": math.prod(_STRIDES),
        "io_channels": 2,
    }
    return {
        "model_type": "diffusion_cond",
        "sample_size": 2097152,
        "sample_rate": SAMPLE_RATE,
        "audio_channels": 2,
        "model": {"pretransform": {"type": "autoencoder", "iterate_batch": True, "config": autoencoder}},
    }


def write_audio_vae(folder: Path | str, *, channels: int = 4, seed: int = 0) -> None:
    """Write `model_config.json` and `model.safetensors` with random float32 weights; equal arguments, equal weights.

    Unit-normal latents decode to noise of audible level (root mean square near 0.1, no constant part).

    Raises:
        OutputError: a file cannot be written.
    """
    config = model_config(channels)
    tensors = _random_weights(channels, seed)
    _set_level(config, tensors, seed)
    # The published file also holds the diffusion model; loaders must not trip over it.
    tensors["model.model.preprocess_conv.weight"] = torch.zeros(AUDIO_CHANNELS, AUDIO_CHANNELS, 1)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_output(folder / PUBLISHED_CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        with atomic_output(folder / PUBLISHED_WEIGHTS) as temporary:
            save_tensors(tensors, temporary)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: cannot write the audio VAE: {error}") from error


def _random_weights(channels: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = audio_vae_shapes(channels)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("weight_g"):
            tensors[name] = torch.full(shape, _gain(name, shapes[f"{name.removesuffix('_g')}_v"]))
        else:
            scale = 1.0 if name.endswith("weight_v") else 0.05
            tensors[name] = scale * torch.randn(shape, generator=generator)
    # The final taps pass neither a constant, which clips unheard, nor the highest tones, which codecs drop.
    final = tensors[f"{_LAST['decoder']}.weight_v"]
    final.copy_(final[:, :, :1] * torch.tensor(_BAND_PASS))
    tensors[f"{_LAST['encoder']}.bias"][AUDIO_CHANNELS:] -= 3.0  # a posterior far narrower than 1
    return tensors


def _gain(name: str, shape: tuple[int, ...]) -> float:
    """Norm of a kernel's rows that keeps the level from the first layer to the last."""
    rows, columns, kernel = shape
    if ".decoder." in name and kernel in {2 * stride for stride in _STRIDES}:
        return math.sqrt(columns * kernel / 2 / rows)  # transposed: two taps of every row add up
    if kernel == 1:
        return 0.3  # ends a residual unit, and there are 15 in a row
    return _INPUT_GAIN if name.startswith(f"{_PREFIX}encoder.layers.0.") else 1.0


def _set_level(config: dict[str, Any], tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Scale the last convolution, which has no bias, so that unit-normal latents decode to `_RMS`."""
    probe = torch.randn(_PROBE, AUDIO_CHANNELS, generator=torch.Generator().manual_seed(seed))
    level = AudioVAE.from_state_dict(config, tensors).decode_waveform(probe).square().mean().sqrt()
    tensors[f"{_LAST['decoder']}.weight_g"] *= _RMS / level
