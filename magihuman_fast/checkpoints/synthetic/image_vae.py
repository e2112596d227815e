"""The Wan 2.2 image autoencoder with random weights, in the published file layout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from ...codecs.image_encoder import PUBLISHED_FILE
from ...errors import OutputError
from ...guards.file_paths import atomic_output
from ...model.config import LATENT_CHANNELS
from ...model.latent_statistics import LATENT_MEAN, LATENT_STD

Shapes = dict[str, tuple[int, ...]]
_PATCH_CHANNELS = 12  # RGB of 2x2 pixels
_MULTIPLES = (1, 2, 4, 4)
_HEAD_RMS = 0.6  # of the normalised, SiLU-activated input of the encoder's last convolution


def wan_vae_shapes(dim: int = 160, decoder_dim: int = 256) -> Shapes:
    """Every key of `Wan2.2_VAE.pth` with its shape; the defaults are the published widths."""
    z = LATENT_CHANNELS
    shapes: Shapes = dict(_conv("conv1", 2 * z, 2 * z, 1)) | dict(_conv("conv2", z, z, 1))

    shapes |= _conv("encoder.conv1", dim, _PATCH_CHANNELS, 3)
    channels = dim
    for i, multiple in enumerate(_MULTIPLES):
        prefix = f"encoder.downsamples.{i}.downsamples"
        for j in range(2):
            shapes |= _resnet(f"{prefix}.{j}", channels, multiple * dim)
            channels = multiple * dim
        if i < 3:
            shapes |= _resample(f"{prefix}.2", channels, time_channels=channels if i > 0 else 0)
    shapes |= _middle("encoder.middle", channels)
    shapes |= _head("encoder.head", channels, 2 * z)

    channels = _MULTIPLES[-1] * decoder_dim
    shapes |= _conv("decoder.conv1", channels, z, 3)
    shapes |= _middle("decoder.middle", channels)
    for i, multiple in enumerate(reversed(_MULTIPLES)):
        prefix = f"decoder.upsamples.{i}.upsamples"
        for j in range(3):
            shapes |= _resnet(f"{prefix}.{j}", channels, multiple * decoder_dim)
            channels = multiple * decoder_dim
        if i < 3:
            shapes |= _resample(f"{prefix}.3", channels, time_channels=2 * channels if i < 2 else 0)
    shapes |= _head("decoder.head", channels, _PATCH_CHANNELS)
    return shapes


def _conv(name: str, out: int, into: int, *kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A convolution; one kernel size stands for all three axes."""
    yield f"{name}.weight", (out, into, *(kernel if len(kernel) > 1 else kernel * 3))
    yield f"{name}.bias", (out,)


def _resnet(name: str, into: int, out: int) -> Shapes:
    shapes: Shapes = {f"{name}.residual.0.gamma": (into, 1, 1, 1), f"{name}.residual.3.gamma": (out, 1, 1, 1)}
    shapes |= _conv(f"{name}.residual.2", out, into, 3)
    shapes |= _conv(f"{name}.residual.6", out, out, 3)
    if into != out:
        shapes |= _conv(f"{name}.shortcut", out, into, 1)
    return shapes


def _resample(name: str, channels: int, time_channels: int) -> Shapes:
    shapes = dict(_conv(f"{name}.resample.1", channels, channels, 3, 3))
    if time_channels:
        shapes |= _conv(f"{name}.time_conv", time_channels, channels, 3, 1, 1)
    return shapes


def _middle(name: str, channels: int) -> Shapes:
    shapes = _resnet(f"{name}.0", channels, channels) | _resnet(f"{name}.2", channels, channels)
    shapes[f"{name}.1.norm.gamma"] = (channels, 1, 1)
    shapes |= _conv(f"{name}.1.to_qkv", 3 * channels, channels, 1, 1)
    shapes |= _conv(f"{name}.1.proj", channels, channels, 1, 1)
    return shapes


def _head(name: str, channels: int, out: int) -> Shapes:
    return {f"{name}.0.gamma": (channels, 1, 1, 1), **dict(_conv(f"{name}.2", out, channels, 3))}


def write_image_vae(folder: Path | str, *, dim: int = 16, decoder_dim: int = 8, seed: int = 0) -> None:
    """Write `Wan2.2_VAE.pth` with random float32 weights to `folder`; equal arguments give equal weights.

    Encoded images come out with mean and standard deviation near 0 and 1, as the transformer expects.

    Raises:
        OutputError: the file cannot be written.
    """
    generator = torch.Generator().manual_seed(seed)
    state_dict: dict[str, torch.Tensor] = {}
    for name, shape in sorted(wan_vae_shapes(dim, decoder_dim).items()):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("gamma"):
            state_dict[name] = 1 + 0.05 * noise
        elif name.endswith("bias"):
            state_dict[name] = 0.02 * noise
        else:
            # Of a kernel over three frames, one image meets the last tap only.
            fan_in = math.prod(shape[1:]) // (shape[2] if len(shape) == 5 else 1)
            state_dict[name] = noise / math.sqrt(fan_in)
    z = LATENT_CHANNELS
    state_dict["conv1.weight"][:z] *= torch.tensor(LATENT_STD).reshape(z, 1, 1, 1, 1) / _HEAD_RMS
    state_dict["conv1.bias"][:z] += torch.tensor(LATENT_MEAN)

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_output(folder / PUBLISHED_FILE) as temporary:
            torch.save(state_dict, temporary)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a disk that is full
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{folder}: cannot write the image VAE: {error}") from error
