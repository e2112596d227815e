"""The decoder's operations of `ops` in plain PyTorch, on pixels (frames, H, W, C): oracle and baseline of the kernels.

Arguments are those of `ops`, already checked. Frame t of a clip lies at index t % len(buffer) of every buffer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .turbo_vae import channel_rms, to_uint8, unpatchify

# Names of what follows a norm; the kernels know them by their place here.
ACTIVATIONS = ("none", "silu", "relu")


def _frames(x: Tensor, times: list[int]) -> Tensor:
    """Frames `times` of a buffer as (1, C, len(times), H, W)."""
    index = torch.tensor([t % len(x) for t in times], device=x.device)
    return x[index].permute(3, 0, 1, 2).unsqueeze(0)


def _put(to: Tensor, first: int, values: Tensor) -> None:
    """(C, n, H, W) to frames first .. first + n - 1 of a buffer."""
    for i in range(values.shape[1]):
        to[(first + i) % len(to)] = values[:, i].permute(1, 2, 0)


def convolve(x: Tensor, w: Tensor, bias: Tensor, first: int, count: int, length: int) -> Tensor:
    """Frames of x convolved with w (out, kt, kh, kw, in): (out, count, H, W), zero padding in space, replication in
    time."""
    kt, kh, kw = w.shape[1:4]
    times = [min(max(t, 0), length - 1) for t in range(first - kt // 2, first + count + kt // 2)]
    weight = w.permute(0, 4, 1, 2, 3)
    return F.conv3d(_frames(x, times), weight, bias.to(x.dtype), padding=(0, kh // 2, kw // 2))[0]


def _activated(v: Tensor, activation: str) -> Tensor:
    return {"none": v, "silu": F.silu(v), "relu": F.relu(v)}[activation]


def finish(
    v: Tensor,
    first: int,
    shortcut: Tensor | None,
    out: Tensor | None,
    out_eps: float,
    normed: Tensor | None,
    eps: float,
    activation: str,
) -> None:
    """What follows a convolution whose result is v (C, n, H, W), frames `first` on of the outputs."""
    if shortcut is not None:
        v = v + _frames(shortcut, list(range(first, first + v.shape[1])))[0]
    if out is not None:
        _put(out, first, channel_rms(v[None], out_eps)[0] if out_eps > 0 else v)
    if normed is not None:
        _put(normed, first, _activated(channel_rms(v[None], eps)[0], activation))


def upsample(x: Tensor, w: Tensor, bias: Tensor, first: int, count: int) -> Tensor:
    """The four phases of a nearest-neighbour upsampling: (out, count, 2 H, 2 W)."""
    frames = _frames(x, list(range(first, first + count)))[0].transpose(0, 1)
    n, _, height, width = frames.shape
    out = frames.new_empty(n, w.shape[1], 2 * height, 2 * width)
    for phase, weight in enumerate(w):
        py, px = divmod(phase, 2)
        padded = F.pad(frames, (1 - px, px, 1 - py, py))
        kernel = weight.permute(0, 3, 1, 2)
        out[:, :, py::2, px::2] = F.conv2d(padded, kernel, bias.to(x.dtype))
    return out.transpose(0, 1)


def double_time(x: Tensor, w: Tensor, bias: Tensor, first: int, count: int, length: int, drop: int) -> Tensor:
    """3x1x1 to twice the channels, interleaved in time: (C, 2 count - drop where that is frame -1, H, W)."""
    halves = [
        convolve(x, w[i][:, :, None, None], bias[i], first, count, length) for i in range(2)
    ]  # (C, n, H, W) each
    both = torch.stack(halves, 2).flatten(1, 2)
    return both[:, 1:] if drop and first == 0 else both


def picture(x: Tensor, w: Tensor, bias: Tensor, first: int, count: int, length: int) -> Tensor:
    """(3, count, 2 H, 2 W) in x's dtype."""
    return unpatchify(convolve(x, w, bias, first, count, length), 2)


def frames_of(picture: Tensor) -> Tensor:
    """uint8 (f, H, W, 3)."""
    return to_uint8(picture)


def channel_norm(
    x: Tensor,
    first: int,
    count: int,
    normed: Tensor,
    eps: float,
    activation: str,
    plain: Tensor | None,
    plain_eps: float,
) -> None:
    v = _frames(x, list(range(first, first + count)))
    if plain is not None:
        _put(plain, first, channel_rms(v, plain_eps)[0])
    _put(normed, first, _activated(channel_rms(v, eps)[0], activation))


def latent_pixels(latent: Tensor, mean: Tensor, std: Tensor, first: int, out: Tensor) -> None:
    times = torch.arange(first, first + len(out), device=latent.device).clamp(max=latent.shape[1] - 1)
    z = latent[:, times] * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1)
    out.copy_(z.permute(1, 2, 3, 0))
