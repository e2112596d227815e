"""The decoder's operations as `torch.ops.magihuman_fast.*`: whole clips in, new tensors out; see `torch_ops`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import ops

Tensor = torch.Tensor


def _backend(tensor: Tensor) -> ops.Backend:
    return "gpu" if tensor.is_cuda else "reference"


def _pixels(x: Tensor, frames: int, scale: int, channels: int) -> Tensor:
    return x.new_empty(frames, scale * x.shape[1], scale * x.shape[2], channels)


def _fake_conv_3x3(x: Tensor, w: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> Tensor:
    return _pixels(x, len(x), 1, len(w))


def _conv_3x3(x: Tensor, w: Tensor, bias: Tensor, shortcut: Tensor | None = None) -> Tensor:
    out = _fake_conv_3x3(x, w, bias)
    ops.conv_3x3(x, w, bias, shortcut=shortcut, out=out, backend=_backend(x))
    return out


def _fake_conv_1x1(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return _pixels(x, len(x), 1, len(w))


def _conv_1x1(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    out = _fake_conv_1x1(x, w, bias)
    ops.conv_1x1(x, w, bias, out=out, backend=_backend(x))
    return out


def _fake_conv_upsample(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return _pixels(x, len(x), 2, w.shape[1])


def _conv_upsample(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    out = _fake_conv_upsample(x, w, bias)
    ops.conv_upsample(x, w, bias, out=out, backend=_backend(x))
    return out


def _fake_conv_time(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return _pixels(x, 2 * len(x), 1, w.shape[1])


def _conv_time(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    out = _fake_conv_time(x, w, bias)
    ops.conv_time(x, w, bias, out=out, backend=_backend(x))
    return out


def _fake_conv_picture(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(len(x), 2 * x.shape[1], 2 * x.shape[2], 3, dtype=torch.uint8)


def _conv_picture(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    return ops.conv_picture(x, w, bias, _fake_conv_picture(x, w, bias), backend=_backend(x))


def _channel_norm(x: Tensor) -> Tensor:
    return ops.channel_norm(x, torch.empty_like(x), backend=_backend(x))


def _latent_pixels(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return ops.latent_pixels(
        latent, mean, std, _fake_latent_pixels(latent, mean, std), backend=_backend(latent)
    )


def _fake_latent_pixels(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    channels, frames, height, width = latent.shape
    return latent.new_empty(frames, height, width, channels, dtype=torch.bfloat16)


_CONV = "(Tensor x, Tensor w, Tensor bias) -> Tensor"
OPERATORS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("conv_3x3(Tensor x, Tensor w, Tensor bias, Tensor? shortcut=None) -> Tensor", _conv_3x3, _fake_conv_3x3),
    (f"conv_1x1{_CONV}", _conv_1x1, _fake_conv_1x1),
    (f"conv_upsample{_CONV}", _conv_upsample, _fake_conv_upsample),
    (f"conv_time{_CONV}", _conv_time, _fake_conv_time),
    (f"conv_picture{_CONV}", _conv_picture, _fake_conv_picture),
    ("channel_norm(Tensor x) -> Tensor", _channel_norm, torch.empty_like),
    ("latent_pixels(Tensor latent, Tensor mean, Tensor std) -> Tensor", _latent_pixels, _fake_latent_pixels),
)
