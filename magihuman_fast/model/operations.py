"""The operations of `ops` in plain PyTorch: oracle and baseline of the kernels, with the rounding of the DiT here.

Shapes and arguments are those of `ops`, already checked. `offsets` are the row ranges (0, Nv, Nv + Na, L); rows of an
output at or beyond L are left alone, as the kernels leave them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import dit
from .dit import Offsets
from .packing import patchify, unpatchify, window_ranges


class QkvGate(NamedTuple):
    """What the attention projection yields: q (M, Hq, 128), k and v (M, Hkv, 128) bfloat16, gate (M, Hq) float32."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gate: torch.Tensor


def _product(a: torch.Tensor, w: torch.Tensor, offsets: Offsets) -> torch.Tensor:
    return dit.grouped_linear(a[: offsets[3]], w, offsets)


def gemm(a: torch.Tensor, w: torch.Tensor, offsets: Offsets, out: torch.Tensor) -> None:
    out[: offsets[3]] = _product(a, w, offsets)


def gemm_residual(a: torch.Tensor, w: torch.Tensor, offsets: Offsets, x: torch.Tensor) -> None:
    x[: offsets[3]] += _product(a, w, offsets)


def gemm_gelu7(a: torch.Tensor, w: torch.Tensor, offsets: Offsets, out: torch.Tensor) -> None:
    out[: offsets[3]] = dit.gelu7(_product(a, w, offsets))


def gemm_swiglu7(a: torch.Tensor, w: torch.Tensor, offsets: Offsets, out: torch.Tensor) -> None:
    width = w.shape[1] // 2
    out[: offsets[3], :width] = dit.swiglu7(_product(a, w, offsets))
    out[: offsets[3], width:] = 0


def gemm_qkv(
    a: torch.Tensor,
    w: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    rope: torch.Tensor,
    offsets: Offsets,
    out: QkvGate,
) -> None:
    rows = offsets[3]
    sizes = [part.shape[1] * part.shape[2] for part in out[:3]] + [out.gate.shape[1]]
    q, k, v, gate = _product(a, w, offsets).split(sizes, 1)
    for part, norm, to in ((q, q_norm, out.q), (k, k_norm, out.k)):
        heads = dit.rms_norm(part.unflatten(1, to.shape[1:]), norm, offsets)
        to[:rows] = dit.apply_rope(heads, rope[:rows])
    out.v[:rows] = v.unflatten(1, out.v.shape[1:])
    out.gate[:rows] = gate


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    offsets: Offsets,
    window: tuple[int, int] | None,
    text_queries: bool,
    out: torch.Tensor,
    attend: dit.Attend = dit.sdpa,
) -> None:
    """`window`: video tokens of a frame, and frames seen on either side."""
    rows, last = offsets[3], offsets[3] if text_queries else offsets[2]
    if last == 0:
        return
    k, v = k[:rows], v[:rows]
    if window is None:
        o = dit.attention(q[:last], k, v, attend=attend)
    else:
        frame, radius = window
        ranges = window_ranges((offsets[1] // frame, frame, 1), rows, radius)
        o = dit.attention(q[:rows], k, v, ranges, attend)[:last]
    out[:last] = o.float() * torch.sigmoid(gate[:last]).unsqueeze(-1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, offsets: Offsets, out: torch.Tensor) -> None:
    out[: offsets[3]] = dit.rms_norm(x[: offsets[3]], weight, offsets)


def embed_text(text: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(F.linear(text, weight, bias))


def embed(
    video: torch.Tensor,
    audio: torch.Tensor,
    text: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    offsets: Offsets,
    out: torch.Tensor,
) -> None:
    _, first_audio, first_text, rows = offsets
    video_weight, video_bias, audio_weight, audio_bias = weights
    out[:first_audio] = F.linear(patchify(video)[:first_audio], video_weight, video_bias)
    out[first_audio:first_text] = F.linear(audio[: first_text - first_audio], audio_weight, audio_bias)
    out[first_text:rows] = text[: rows - first_text]


def head(
    x: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    offsets: Offsets,
    video_out: torch.Tensor,
    audio_out: torch.Tensor,
) -> None:
    _, first_audio, first_text, _ = offsets
    tokens, sound = (
        F.linear(dit.rms_norm(x[a:b], norm.unsqueeze(0), offsets), weight)
        for (a, b), norm, weight in zip(
            ((0, first_audio), (first_audio, first_text)), norms, weights, strict=True
        )
    )
    _, frames, height, width = video_out.shape
    video_out.copy_(unpatchify(tokens, (frames, height // 2, width // 2)))
    audio_out[: len(sound)] = sound


def renoise_step(
    x: torch.Tensor, velocity: torch.Tensor, noise: torch.Tensor, table: torch.Tensor, step: int
) -> None:
    if 0 <= step < len(table):
        sigma, keep, renoise = table[step].unbind()
        x.copy_(renoise * noise[step] + keep * (x - sigma * velocity))


def clamp_image(video: torch.Tensor, image: torch.Tensor) -> None:
    video[:, 0] = image


def unipc_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    x_last: torch.Tensor,
    history: torch.Tensor,
    table: torch.Tensor,
    step: int,
    null_velocity: torch.Tensor | None,
    guidance: torch.Tensor | None,
) -> None:
    if not 0 <= step < len(table):
        return
    sigma, own, last, old, prev, new, keep, current, previous = table[step].unbind()
    if null_velocity is not None and guidance is not None:
        scale = guidance[step].unsqueeze(-1).unsqueeze(-1) if x.ndim == 4 else guidance[step]
        velocity = null_velocity + scale * (velocity - null_velocity)
    m = x - sigma * velocity
    # A factor of zero leaves its term out: the history may begin with anything.
    corrected = new * m
    for factor, term in ((own, x), (last, x_last), (old, history[step % 2]), (prev, history[1 - step % 2])):
        if factor != 0:
            corrected = corrected + factor * term
    out = keep * corrected + current * m
    if previous != 0:
        out += previous * history[1 - step % 2]
    x.copy_(out)
    x_last.copy_(corrected)
    history[step % 2] = m
