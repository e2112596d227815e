"""The decoder's convolution weights as the kernels read them: packed once at load, channels innermost."""

from __future__ import annotations

import torch
from torch import Tensor

from ..model.turbo_vae import TurboVAE

Layers = dict[str, tuple[Tensor, Tensor]]  # packed weight and float32 bias by name


def pack_conv(weight: Tensor) -> Tensor:
    """(out, in, kt, kh, kw) to (out, kt, kh, kw, in), contiguous."""
    return weight.permute(0, 2, 3, 4, 1).contiguous()


def pack_time(weight: Tensor) -> Tensor:
    """The time upsampler's (2 C, in, 3, 1, 1), halves one after the other, to (2, C, 3, in)."""
    return pack_conv(weight)[:, :, 0, 0].unflatten(0, (2, -1))


def pack_upsample(weight: Tensor) -> Tensor:
    """The 3x3 weights (out, in, 3, 3) behind a nearest-neighbour doubling to (4: py px, out, 2, 2, in).

    Row Y + d of the doubled picture, d = -1, 0, 1, is row (Y + d) // 2 of the small one. So of the three taps of an
    even row the last two meet the same pixel, of an odd row the first two: their sum is one tap. Sums are taken in
    float32 and rounded once to weight's dtype.
    """

    def halve(w: Tensor, dim: int) -> list[Tensor]:
        a, b, c = w.unbind(dim)
        return [torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)]

    phases = [column for row in halve(weight.float(), 2) for column in halve(row, 3)]
    return torch.stack(phases).to(weight.dtype).permute(0, 1, 3, 4, 2).contiguous()


def pack_layers(model: TurboVAE) -> Layers:
    """Every convolution's weights as the kernels read them, and its bias in float32."""
    layers: Layers = {}
    for key, weight in model.weights.items():
        if not key.endswith(".weight"):
            continue
        name = key.removesuffix(".weight")
        bias = model.weights[f"{name}.bias"].float()
        if ".resample." in name:
            layers[name] = pack_upsample(weight), bias
        elif ".time_conv." in name:
            layers[name] = pack_time(weight), bias.view(2, -1)
        else:
            layers[name] = pack_conv(weight), bias
    return layers
