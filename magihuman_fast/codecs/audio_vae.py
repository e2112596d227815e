"""Sound ↔ audio latents: the Stable Audio Open 1.0 autoencoder (MODEL.md sections 6 and 9).

The network is diffusers' `AutoencoderOobleck` with its weight norms folded. It was trained on 44100 Hz and 2048
samples a latent; the transformer's audio latents run at 25 Hz. So sound goes in at 51200 Hz (2048 x 25), and what
comes out is resampled by 441/512.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from ..errors import CheckpointError, InputError
from ..guards.download_faults import contents, hints
from ..model.config import AUDIO_CHANNELS, FPS, SAMPLE_RATE
from ..model.conv_precision import conv_precision
from ..model.weights import check_state_dict, open_checkpoint, read_json, shapes_of
from .audio_vae_config import SAMPLES_PER_LATENT, Architecture, diffusers_architecture, published_architecture
from .diffusers_vae import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    copy_weight,
    diffusers_files,
    fill,
    find_diffusers_folder,
)

PUBLISHED_CONFIG = "model_config.json"
PUBLISHED_WEIGHTS = "model.safetensors"
_PREFIX = "pretransform.model."

INPUT_RATE = FPS * SAMPLES_PER_LATENT
"""Sampling rate `AudioVAE.encode` takes, Hz (51200)."""
WINDOW_SAMPLES = 29 * INPUT_RATE
OVERLAP_RATIO = 0.5
DECODE_WINDOW = 512  # latents decoded at once (20 s): what bounds the memory of a long decode


def merge_overlapping(windows: Sequence[torch.Tensor] | torch.Tensor, overlap_ratio: float) -> torch.Tensor:
    """Join latents of overlapping windows, fading linearly from one window to the next.

    Args:
        windows: n windows (T, C) of one length; `int(T * overlap_ratio)` latents are shared with the next.
        overlap_ratio: 0 to below 1.

    Returns:
        `((n - 1) * (T - overlap) + T, C)`. Inside an overlap, latent i weighs the later window by
        `i / overlap`.

    Raises:
        InputError: no windows, windows of different shapes, or a ratio out of range.
    """
    if not len(windows) or any(w.ndim != 2 or w.shape != windows[0].shape for w in windows):
        raise InputError(f"windows must be (T, C), all of one shape, got {[tuple(w.shape) for w in windows]}")
    if not 0 <= overlap_ratio < 1:
        raise InputError(f"overlap_ratio must be at least 0 and below 1, got {overlap_ratio}")
    frames = windows[0].shape[0]
    overlap = int(frames * overlap_ratio)
    step = frames - overlap
    merged = windows[0].new_empty((len(windows) - 1) * step + frames, windows[0].shape[1])
    merged[:frames] = windows[0]
    later = (torch.arange(overlap, device=merged.device, dtype=merged.dtype) / max(overlap, 1))[:, None]
    for i, window in enumerate(windows[1:], 1):
        start = i * step
        shared = merged[start : start + overlap]
        shared.copy_((1 - later) * shared + later * window[:overlap])
        merged[start + overlap : start + frames] = window[overlap:]
    return merged


class AudioVAE:
    """Latents (Na, 64) at 25 Hz → stereo sound, and back. Made by `from_pretrained`."""

    sample_rate = SAMPLE_RATE
    """Hz of what `decode` returns."""
    input_rate = INPUT_RATE
    """Hz of what `encode` takes and `decode_waveform` returns, on the latents' clock."""
    samples_per_latent = SAMPLES_PER_LATENT
    latent_channels = AUDIO_CHANNELS

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        decoder_reach: int,
        device: torch.device,
        dtype: torch.dtype,
        allow_tf32: bool,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.allow_tf32 = allow_tf32
        self._encoder = encoder
        self._decoder = decoder
        self._decoder_reach = decoder_reach

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_tf32: bool = False,
    ) -> AudioVAE:
        """Load a folder in the published layout, or in that of diffusers (the folder itself or its `vae/`).

        The published one holds `model_config.json` and `model.safetensors`, of which only the keys under
        `pretransform.model.` are read.

        Raises:
            CheckpointError: neither there, unreadable, or of another configuration, with other keys or shapes.
        """
        path = Path(path)
        config_file = path / PUBLISHED_CONFIG
        folder = find_diffusers_folder(path)
        if config_file.is_file() and ((path / PUBLISHED_WEIGHTS).is_file() or folder is None):
            arch = published_architecture(read_json(config_file), config_file)
            checkpoint = open_checkpoint(path, prefix=_PREFIX)
            state_dict = {name.removeprefix(_PREFIX): tensor for name, tensor in checkpoint.tensors()}
            return cls._load(
                arch, state_dict, "published", path / PUBLISHED_WEIGHTS, device, dtype, allow_tf32
            )
        if folder is None:
            raise CheckpointError(
                f"{path}: no audio autoencoder: expected {PUBLISHED_CONFIG} and {PUBLISHED_WEIGHTS}, "
                f"or {CONFIG_FILE} and {WEIGHTS_FILE} here or in vae/; found {contents(path)}"
                + hints([config_file, path / PUBLISHED_WEIGHTS, *diffusers_files(path)])
            )
        config = read_json(folder / CONFIG_FILE)
        arch = diffusers_architecture(config, folder / CONFIG_FILE)
        state_dict = dict(open_checkpoint(folder / WEIGHTS_FILE).tensors())
        return cls._load(arch, state_dict, "diffusers", folder / WEIGHTS_FILE, device, dtype, allow_tf32)

    @classmethod
    def from_state_dict(
        cls,
        model_config: Mapping[str, Any],
        state_dict: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_tf32: bool = False,
    ) -> AudioVAE:
        """Build from the published `model_config.json` and names.

        Keys under `pretransform.model.` are used, all others ignored; where none has that prefix, all keys are
        taken as already stripped of it. On a GPU float32 means float32; `allow_tf32` leaves that to torch's
        settings, which by default trade exactness (about 1e-3) for speed.

        Raises:
            CheckpointError: a configuration this autoencoder does not support, or other keys or shapes.
        """
        arch = published_architecture(dict(model_config), "audio autoencoder config")
        stripped = {n.removeprefix(_PREFIX): t for n, t in state_dict.items() if n.startswith(_PREFIX)}
        return cls._load(
            arch, stripped or state_dict, "published", "audio autoencoder", device, dtype, allow_tf32
        )

    @classmethod
    def _load(
        cls,
        arch: Architecture,
        state_dict: Mapping[str, torch.Tensor],
        layout: str,
        where: object,
        device: torch.device | str,
        dtype: torch.dtype,
        allow_tf32: bool,
    ) -> AudioVAE:
        published = layout == "published"
        parts = _meta_parts(arch)
        blocks = len(arch.strides)
        names = {n: _published_module(n, blocks) if published else n for n in _leaf_modules(parts)}
        expected: dict[str, tuple[int, ...]] = {}
        for name, module in _leaf_modules(parts).items():
            for parameter, tensor in module.state_dict().items():
                shape = tuple(tensor.shape)
                key = f"{names[name]}.{parameter}"
                if parameter == "weight":
                    expected |= {f"{key}_g": (shape[0], 1, 1), f"{key}_v": shape}
                else:
                    expected[key] = (tensor.numel(),) if published else shape
        check_state_dict(shapes_of(state_dict, where), expected, where)

        def read(key: str, into: torch.dtype) -> torch.Tensor:
            return copy_weight(key, state_dict[key], device, into, where)

        for part, root in parts.items():
            weights = {}
            for name, module in _leaf_modules({part: root}).items():
                for parameter, tensor in module.state_dict().items():
                    key = f"{names[name]}.{parameter}"
                    if parameter == "weight":
                        g, v = (read(f"{key}_{half}", torch.float32) for half in "gv")
                        value = (v * (g / v.norm(dim=(1, 2), keepdim=True))).to(dtype)
                    else:
                        value = read(key, dtype).reshape(tensor.shape)
                    weights[f"{name}.{parameter}".removeprefix(f"{part}.")] = value
            fill(root, weights)
        return cls(
            parts["encoder"],
            parts["decoder"],
            decoder_reach=arch.decoder_reach,
            device=torch.device(device),
            dtype=dtype,
            allow_tf32=allow_tf32,
        )

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode latents (Na, 64) to sound: float32 (1764 Na, 2) at 44100 Hz, on the CPU.

        Raises:
            InputError: another shape, or values that are not finite.
        """
        from scipy.signal import resample

        waveform = self.decode_waveform(latent).T.cpu().numpy()
        count = int(waveform.shape[0] * 441 / 512)
        return torch.from_numpy(resample(waveform, count).astype("float32", copy=False))

    def decode_waveform(self, latent: torch.Tensor) -> torch.Tensor:
        """Decode latents (Na, 64) to float32 (2, 2048 Na) at 51200 Hz, on the model's device.

        Long latents are decoded in windows with as much context as reaches into them, so windows do not show.
        """
        _check_floats("latent", latent, f"(Na, {AUDIO_CHANNELS}) with Na >= 1")
        if latent.ndim != 2 or latent.shape[1] != AUDIO_CHANNELS or not len(latent):
            raise InputError(f"latent must be (Na, {AUDIO_CHANNELS}) with Na >= 1, got {tuple(latent.shape)}")
        z = latent.to(self.device, self.dtype).T[None]
        frames = z.shape[-1]
        pieces = []
        with torch.no_grad(), conv_precision(self.device, self.allow_tf32):
            for start in range(0, frames, DECODE_WINDOW):
                end = min(start + DECODE_WINDOW, frames)
                left, right = max(start - self._decoder_reach, 0), min(end + self._decoder_reach, frames)
                wave = self._decoder(z[..., left:right])[0].float()
                pieces.append(
                    wave[:, (start - left) * SAMPLES_PER_LATENT : (end - left) * SAMPLES_PER_LATENT]
                )
        return torch.cat(pieces, dim=1)

    def encode(
        self,
        waveform: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode stereo sound to sampled latents, `mean + noise · (softplus(scale) + 1e-4)`.

        Up to 29 s are encoded at once. Longer sound goes through windows of 29 s, each starting 14.5 s after the
        one before, the last padded with silence; their latents are cross-faded. (A window has 725 latents, and
        half of them is no whole number: each further window sits half a latent, 20 ms, later than its sound, as
        in the published model.)

        Args:
            waveform: (2, n) at 51200 Hz, n >= 2048.
            generator: draws the noise, (1, 64, T) for each window in turn, on its own device.
            noise: the noise itself, (T, 64), or (windows, 725, 64) where there are several windows.

        Returns:
            float32 (Na, 64) on the model's device; Na = n // 2048 for up to 29 s, above that ceil(n / 2048).

        Raises:
            InputError: another shape, values that are not finite, or both `generator` and `noise`.
        """
        _check_floats("waveform", waveform, f"(2, n) with n >= {SAMPLES_PER_LATENT}")
        if waveform.ndim != 2 or waveform.shape[0] != 2 or waveform.shape[1] < SAMPLES_PER_LATENT:
            raise InputError(
                f"waveform must be (2, n) with n >= {SAMPLES_PER_LATENT}, got {tuple(waveform.shape)}"
            )
        if generator is not None and noise is not None:
            raise InputError("give either generator or noise, not both")
        samples = waveform.shape[1]
        step = int(WINDOW_SAMPLES * (1 - OVERLAP_RATIO))
        count = 1 + max(0, ceil((samples - WINDOW_SAMPLES) / step))
        frames = (samples if count == 1 else WINDOW_SAMPLES) // SAMPLES_PER_LATENT
        if noise is not None:
            shape = (frames, AUDIO_CHANNELS) if count == 1 else (count, frames, AUDIO_CHANNELS)
            if tuple(noise.shape) != shape:
                raise InputError(f"noise must be {shape} for {samples} samples, got {tuple(noise.shape)}")
            noise = noise.reshape(count, frames, AUDIO_CHANNELS)
        windows = []
        for i in range(count):
            piece = waveform[:, i * step : i * step + WINDOW_SAMPLES]
            if count > 1:
                piece = functional.pad(piece, (0, WINDOW_SAMPLES - piece.shape[1]))
            mean, std = self._posterior(piece)
            if noise is not None:
                drawn = noise[i].T
            else:
                device = self.device if generator is None else generator.device
                drawn = torch.randn(1, AUDIO_CHANNELS, frames, generator=generator, device=device)[0]
            windows.append((mean + drawn.to(mean) * std).T)
        return merge_overlapping(windows, OVERLAP_RATIO)[: ceil(samples / SAMPLES_PER_LATENT)].contiguous()

    def _posterior(self, waveform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation, float32 (64, T) each, of a waveform (2, n)."""
        with torch.no_grad(), conv_precision(self.device, self.allow_tf32):
            hidden = self._encoder(waveform.to(self.device, self.dtype)[None])[0].float()
        mean, scale = hidden.chunk(2)
        return mean, functional.softplus(scale) + 1e-4


def _check_floats(name: str, value: object, expected: str) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(f"{name} must be a floating-point tensor {expected}, got {got}")
    if not torch.isfinite(value).all():
        raise InputError(f"{name} must be finite, got NaN or infinity")


def _meta_parts(arch: Architecture) -> dict[str, nn.Module]:
    """Encoder and decoder without storage, every weight-normed convolution replaced by a plain one."""
    return copy.deepcopy(_first_meta_parts(arch))


# Weight norms take long to put on layers, only to be taken off again: a check and a load share one effort.
@lru_cache(maxsize=1)
def _first_meta_parts(arch: Architecture) -> dict[str, nn.Module]:
    from diffusers import AutoencoderOobleck

    with torch.device("meta"), warnings.catch_warnings():
        # torch deprecates the weight norm that diffusers builds here and that is taken off again below.
        warnings.simplefilter("ignore", FutureWarning)
        model = AutoencoderOobleck(
            encoder_hidden_size=arch.encoder_channels,
            downsampling_ratios=list(arch.strides),
            channel_multiples=list(arch.multiples),
            decoder_channels=arch.decoder_channels,
            decoder_input_channels=AUDIO_CHANNELS,
            audio_channels=2,
            sampling_rate=SAMPLE_RATE,
        )
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv1d | nn.ConvTranspose1d):
                    setattr(parent, name, _plain(child))
        # diffusers ties the latent width to the encoder's, which holds for the published sizes only.
        last = model.encoder.conv2
        model.encoder.conv2 = nn.Conv1d(
            last.in_channels, 2 * AUDIO_CHANNELS, last.kernel_size, padding=last.padding
        )
    return {"encoder": model.encoder, "decoder": model.decoder}


def _plain(conv: nn.Conv1d | nn.ConvTranspose1d) -> nn.Module:
    kind = nn.ConvTranspose1d if isinstance(conv, nn.ConvTranspose1d) else nn.Conv1d
    return cast(Any, kind)(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        bias=conv.bias is not None,
    )


def _leaf_modules(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Every module with weights of its own, under its name in diffusers."""
    return {
        f"{part}.{name}": module
        for part, root in parts.items()
        for name, module in root.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }


def _published_module(name: str, blocks: int) -> str:
    """The published name of a diffusers module; the published file numbers every module within its parent."""
    part, *path = name.split(".")
    top = {"conv1": 0, "snake1": blocks + 1, "conv2": blocks + 2}
    inner = {"snake1": 3, "conv1": 4} if part == "encoder" else {"snake1": 0, "conv_t1": 1}
    unit = {"snake1": 0, "conv1": 1, "snake2": 2, "conv2": 3}
    first_unit = 0 if part == "encoder" else 2
    if path[0] != "block":
        return f"{part}.layers.{top[path[0]]}"
    block = f"{part}.layers.{int(path[1]) + 1}.layers"
    if len(path) == 3:
        return f"{block}.{inner[path[2]]}"
    return f"{block}.{first_unit + int(path[2][-1]) - 1}.layers.{unit[path[3]]}"
