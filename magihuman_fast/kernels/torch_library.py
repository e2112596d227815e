"""The operations of `ops` as `torch.ops.magihuman_fast.*`, for users who trace, export or compile.

A façade: nothing in the package uses it. Importing this module registers the operators. CUDA tensors run the kernels,
CPU tensors the reference. Operators with an output return a new tensor whose rows at or beyond the last modality offset
are zero; the others change their arguments in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..model.config import PATCH
from . import ops
from .products import HEAD_DIM

NAMESPACE = "magihuman_fast"


def _backend(tensor: Tensor) -> ops.Backend:
    return "gpu" if tensor.is_cuda else "reference"


def _rows(like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros (rows of `like`, columns), at a row pitch that kernels can write."""
    pitch = -(-columns // 8) * 8
    return like.new_zeros(len(like), pitch, dtype=dtype)[:, :columns]


def _gemm(a: Tensor, w: Tensor, modality_offsets: Tensor | None = None) -> Tensor:
    out = _rows(a, w.shape[1], a.dtype)
    return ops.gemm(a, w, modality_offsets=modality_offsets, out=out, backend=_backend(a))


def _gemm_gelu7(a: Tensor, w: Tensor, modality_offsets: Tensor | None = None) -> Tensor:
    out = _rows(a, w.shape[1], a.dtype)
    return ops.gemm_gelu7(a, w, modality_offsets=modality_offsets, out=out, backend=_backend(a))


def _fake_gemm(a: Tensor, w: Tensor, modality_offsets: Tensor | None = None) -> Tensor:
    return _rows(a, w.shape[1], a.dtype)


def _gemm_swiglu7(a: Tensor, w: Tensor, columns: int, modality_offsets: Tensor | None = None) -> Tensor:
    out = _rows(a, columns, a.dtype)
    return ops.gemm_swiglu7(a, w, modality_offsets=modality_offsets, out=out, backend=_backend(a))


def _fake_gemm_swiglu7(a: Tensor, w: Tensor, columns: int, modality_offsets: Tensor | None = None) -> Tensor:
    return _rows(a, columns, a.dtype)


def _gemm_residual(a: Tensor, w: Tensor, x: Tensor, modality_offsets: Tensor | None = None) -> None:
    ops.gemm_residual(a, w, x, modality_offsets=modality_offsets, backend=_backend(a))


def _qkv_outputs(a: Tensor, num_q_heads: int, num_kv_heads: int) -> ops.QkvGate:
    q, k, v = (a.new_zeros(len(a), heads, HEAD_DIM) for heads in (num_q_heads, num_kv_heads, num_kv_heads))
    return ops.QkvGate(q, k, v, a.new_zeros(len(a), num_q_heads, dtype=torch.float32))


def _gemm_qkv(
    a: Tensor,
    w: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rope: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    modality_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = _qkv_outputs(a, num_q_heads, num_kv_heads)
    ops.gemm_qkv(
        a,
        w,
        q_norm,
        k_norm,
        rope,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        modality_offsets=modality_offsets,
        out=out,
        backend=_backend(a),
    )
    return out.q, out.k, out.v, out.gate


def _fake_gemm_qkv(
    a: Tensor,
    w: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    rope: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    modality_offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, gate = _qkv_outputs(a, num_q_heads, num_kv_heads)
    return q, k, v, gate


def _gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    modality_offsets: Tensor | None = None,
    tokens_per_frame: int | None = None,
    frame_window: int | None = None,
    text_queries: bool = True,
) -> Tensor:
    return ops.gated_attention(
        q,
        k,
        v,
        gate,
        modality_offsets=modality_offsets,
        tokens_per_frame=tokens_per_frame,
        frame_window=frame_window,
        text_queries=text_queries,
        out=torch.zeros_like(q),
        backend=_backend(q),
    )


def _fake_gated_attention(q: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return torch.zeros_like(q)


def _rms_norm(x: Tensor, weight: Tensor, modality_offsets: Tensor | None = None) -> Tensor:
    out = _rows(x, x.shape[1], torch.bfloat16)
    return ops.rms_norm(x, weight, modality_offsets=modality_offsets, out=out, backend=_backend(x))


def _fake_rms_norm(x: Tensor, weight: Tensor, modality_offsets: Tensor | None = None) -> Tensor:
    return _rows(x, x.shape[1], torch.bfloat16)


def _embed_text(text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return ops.embed_text(text, weight, bias, backend=_backend(text))


def _fake_embed_text(text: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return text.new_empty(len(text), len(weight))


def _embed(
    video: Tensor,
    audio: Tensor,
    text_embedding: Tensor,
    video_weight: Tensor,
    video_bias: Tensor,
    audio_weight: Tensor,
    audio_bias: Tensor,
    modality_offsets: Tensor,
) -> Tensor:
    return ops.embed(
        video,
        audio,
        text_embedding,
        video_weight=video_weight,
        video_bias=video_bias,
        audio_weight=audio_weight,
        audio_bias=audio_bias,
        modality_offsets=modality_offsets,
        out=_stream_of(video, audio, text_embedding),
        backend=_backend(video),
    )


def _stream_of(video: Tensor, audio: Tensor, text_embedding: Tensor) -> Tensor:
    rows = video[0].numel() // PATCH**2 + len(audio) + len(text_embedding)
    return video.new_zeros(rows, text_embedding.shape[1])


def _fake_embed(
    video: Tensor,
    audio: Tensor,
    text_embedding: Tensor,
    video_weight: Tensor,
    video_bias: Tensor,
    audio_weight: Tensor,
    audio_bias: Tensor,
    modality_offsets: Tensor,
) -> Tensor:
    return _stream_of(video, audio, text_embedding)


def _velocities(
    x: Tensor, video_weight: Tensor, audio_weight: Tensor, grid: list[int], audio_rows: int
) -> tuple[Tensor, Tensor]:
    channels = len(video_weight) // PATCH**2
    return x.new_zeros(channels, *grid), x.new_zeros(audio_rows, len(audio_weight))


def _head(
    x: Tensor,
    video_norm: Tensor,
    audio_norm: Tensor,
    video_weight: Tensor,
    audio_weight: Tensor,
    modality_offsets: Tensor,
    grid: list[int],
    audio_rows: int,
) -> tuple[Tensor, Tensor]:
    video, audio = _velocities(x, video_weight, audio_weight, grid, audio_rows)
    return ops.head(
        x,
        video_norm=video_norm,
        audio_norm=audio_norm,
        video_weight=video_weight,
        audio_weight=audio_weight,
        modality_offsets=modality_offsets,
        video_out=video,
        audio_out=audio,
        backend=_backend(x),
    )


def _fake_head(
    x: Tensor,
    video_norm: Tensor,
    audio_norm: Tensor,
    video_weight: Tensor,
    audio_weight: Tensor,
    modality_offsets: Tensor,
    grid: list[int],
    audio_rows: int,
) -> tuple[Tensor, Tensor]:
    return _velocities(x, video_weight, audio_weight, grid, audio_rows)


def _renoise_step(x: Tensor, velocity: Tensor, noise: Tensor, table: Tensor, step: Tensor) -> None:
    ops.renoise_step(x, velocity, noise, table, step, backend=_backend(x))


def _clamp_image(video: Tensor, image: Tensor) -> None:
    ops.clamp_image(video, image, backend=_backend(video))


def _unipc_step(
    x: Tensor,
    velocity: Tensor,
    x_last: Tensor,
    history: Tensor,
    table: Tensor,
    step: Tensor,
    null_velocity: Tensor | None = None,
    guidance: Tensor | None = None,
) -> None:
    ops.unipc_step(
        x,
        velocity,
        x_last,
        history,
        table,
        step,
        null_velocity=null_velocity,
        guidance=guidance,
        backend=_backend(x),
    )


def _advance_step(step: Tensor) -> None:
    ops.advance_step(step, backend=_backend(step))


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


def _changes_in_place(*arguments: Any) -> None:
    """The fake of an operator without an output."""


_CONV = "(Tensor x, Tensor w, Tensor bias) -> Tensor"
_EMBEDDERS = "Tensor video_weight, Tensor video_bias, Tensor audio_weight, Tensor audio_bias"
_HEADS = "Tensor video_norm, Tensor audio_norm, Tensor video_weight, Tensor audio_weight"
_OPERATORS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("gemm(Tensor a, Tensor w, Tensor? modality_offsets=None) -> Tensor", _gemm, _fake_gemm),
    ("gemm_gelu7(Tensor a, Tensor w, Tensor? modality_offsets=None) -> Tensor", _gemm_gelu7, _fake_gemm),
    (
        "gemm_swiglu7(Tensor a, Tensor w, SymInt columns, Tensor? modality_offsets=None) -> Tensor",
        _gemm_swiglu7,
        _fake_gemm_swiglu7,
    ),
    (
        "gemm_residual(Tensor a, Tensor w, Tensor(x!) x, Tensor? modality_offsets=None) -> ()",
        _gemm_residual,
        _changes_in_place,
    ),
    (
        "gemm_qkv(Tensor a, Tensor w, Tensor q_norm, Tensor k_norm, Tensor rope, int num_q_heads, "
        "int num_kv_heads, Tensor? modality_offsets=None) -> (Tensor, Tensor, Tensor, Tensor)",
        _gemm_qkv,
        _fake_gemm_qkv,
    ),
    (
        "gated_attention(Tensor q, Tensor k, Tensor v, Tensor gate, Tensor? modality_offsets=None, "
        "int? tokens_per_frame=None, int? frame_window=None, bool text_queries=True) -> Tensor",
        _gated_attention,
        _fake_gated_attention,
    ),
    ("rms_norm(Tensor x, Tensor weight, Tensor? modality_offsets=None) -> Tensor", _rms_norm, _fake_rms_norm),
    ("embed_text(Tensor text, Tensor weight, Tensor bias) -> Tensor", _embed_text, _fake_embed_text),
    (
        f"embed(Tensor video, Tensor audio, Tensor text_embedding, {_EMBEDDERS}, "
        "Tensor modality_offsets) -> Tensor",
        _embed,
        _fake_embed,
    ),
    (
        f"head(Tensor x, {_HEADS}, Tensor modality_offsets, SymInt[3] grid, SymInt audio_rows) "
        "-> (Tensor, Tensor)",
        _head,
        _fake_head,
    ),
    (
        "renoise_step(Tensor(x!) x, Tensor velocity, Tensor noise, Tensor table, Tensor step) -> ()",
        _renoise_step,
        _changes_in_place,
    ),
    ("clamp_image(Tensor(x!) video, Tensor image) -> ()", _clamp_image, _changes_in_place),
    (
        "unipc_step(Tensor(x!) x, Tensor velocity, Tensor(y!) x_last, Tensor(z!) history, Tensor table, "
        "Tensor step, Tensor? null_velocity=None, Tensor? guidance=None) -> ()",
        _unipc_step,
        _changes_in_place,
    ),
    ("advance_step(Tensor(x!) step) -> ()", _advance_step, _changes_in_place),
    ("conv_3x3(Tensor x, Tensor w, Tensor bias, Tensor? shortcut=None) -> Tensor", _conv_3x3, _fake_conv_3x3),
    (f"conv_1x1{_CONV}", _conv_1x1, _fake_conv_1x1),
    (f"conv_upsample{_CONV}", _conv_upsample, _fake_conv_upsample),
    (f"conv_time{_CONV}", _conv_time, _fake_conv_time),
    (f"conv_picture{_CONV}", _conv_picture, _fake_conv_picture),
    ("channel_norm(Tensor x) -> Tensor", _channel_norm, torch.empty_like),
    ("latent_pixels(Tensor latent, Tensor mean, Tensor std) -> Tensor", _latent_pixels, _fake_latent_pixels),
)


def _register() -> None:
    for schema, implementation, fake in _OPERATORS:
        name, signature = schema.split("(", 1)
        torch.library.define(f"{NAMESPACE}::{name}", f"({signature}")
        torch.library.impl(f"{NAMESPACE}::{name}", ("cpu", "cuda"), implementation)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake)


_register()
