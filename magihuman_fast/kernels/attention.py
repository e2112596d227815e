"""Gated attention, checked and launched; see `ops`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ..model import dit
from ..model import operations as reference
from .launch import BACKENDS, choose_backend, host_ranges, launch
from .products import BF16, F32, HEAD_DIM
from .tensor_checks import check_disjoint, check_offsets, check_tensor, require

AttentionBackend = Literal["gpu", "sim", "reference", "sdpa", "flash_attn"]
# What replaces the softmax products where a library is asked for by name.
LIBRARIES = ("sdpa", "flash_attn")
MAX_RADIUS = 1 << 20
TILES = (
    "128x176, pairs",
    "128x176",
    "128x128",
)  # queries x keys; as csrc/attention/tile_config.h numbers them


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    *,
    modality_offsets: torch.Tensor | None = None,
    tokens_per_frame: int | None = None,
    frame_window: int | None = None,
    text_queries: bool = True,
    out: torch.Tensor | None = None,
    num_sms: int = 0,
    tile: str | None = None,
    backend: AttentionBackend | None = None,
) -> torch.Tensor:
    """out = bf16(sigmoid(gate) softmax(q kT / sqrt(128)) v), a head of q with key/value head h // (Hq / Hkv).

    Every row attends to every row, or, with `frame_window`, video rows attend to the video rows of the latent frames
    at most so far away and to all audio and text rows, which attend to everything (MODEL.md section 4).

    Args:
        q: (M, Hq, 128) bfloat16. k, v: (M, Hkv, 128) bfloat16, Hkv divides Hq. gate: (M, Hq) float32, logits.
        tokens_per_frame: video rows of one latent frame, a divisor of their number (of offsets on a GPU, which are
            not looked at, the kernel takes the rest as a short last frame). frame_window: frames seen on either side,
            0 to 2^20. Given together, with `modality_offsets`.
        text_queries: False leaves the text rows of `out` as they are: nothing reads them after the last layer.
        tile: one of `TILES` instead of the one that is predicted to be the fastest: for measurements.
        out: (M, Hq, 128) bfloat16, contiguous. A new one holds anything in rows that are not computed.
        backend: beside those of `ops`, "sdpa" and "flash_attn": torch's attention or that of the package flash-attn,
            then the gate, on any device that the library supports. They read the offsets on the host.
    """
    op = "gated_attention"
    require(isinstance(q, torch.Tensor), f"{op}: q", "a torch.Tensor", type(q).__name__)
    check_tensor(f"{op}: q", q, (None, None, HEAD_DIM), BF16, q.device)
    rows, num_q_heads, _ = q.shape
    for name, tensor in (("k", k), ("v", v)):
        check_tensor(f"{op}: {name}", tensor, (rows, None, HEAD_DIM), BF16, q.device)
    num_kv_heads = k.shape[1]
    require(v.shape == k.shape, f"{op}: v", f"the shape of k, {tuple(k.shape)}", tuple(v.shape))
    divides = num_kv_heads > 0 and num_q_heads > 0 and num_q_heads % num_kv_heads == 0
    require(divides, f"{op}: k", f"a number of heads that divides the {num_q_heads} of q", num_kv_heads)
    check_tensor(f"{op}: gate", gate, (rows, num_q_heads), F32, q.device)
    if modality_offsets is not None:
        check_offsets(f"{op}: modality_offsets", modality_offsets, rows, q.device)
    window = _check_window(op, modality_offsets, tokens_per_frame, frame_window, text_queries)
    require(tile is None or tile in TILES, f"{op}: tile", f"one of {TILES} or None", repr(tile))
    chosen = _choose(op, q, backend)
    if out is None:
        out = torch.empty_like(q)
    check_tensor(f"{op}: out", out, tuple(q.shape), BF16, q.device)
    for name, source in (("q", q), ("k", k), ("v", v), ("gate", gate)):
        check_disjoint(f"{op}: out", out, source, name)

    if chosen in ("gpu", "sim"):
        if rows:
            tensors = {"q": q, "k": k, "v": v, "gate": gate, "modality_offsets": modality_offsets, "out": out}
            heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
            frame, radius = window or (0, 0)
            numbers = {"m": rows, **heads, "tokens_per_frame": frame, "frame_window": radius}
            grid = {"num_sms": num_sms, "tile": -1 if tile is None else TILES.index(tile)}
            launch(chosen, op, tensors, **numbers, text_queries=text_queries, **grid)
        return out
    offsets = host_ranges(modality_offsets, rows)
    if window is not None:
        _check_frames(op, offsets[1], window[0])
    attend = {"reference": dit.sdpa, "sdpa": _sdpa, "flash_attn": _flash_attn}[chosen]
    reference.gated_attention(q, k, v, gate, offsets, window, text_queries, out, attend)
    return out


def _check_window(
    op: str, offsets: torch.Tensor | None, frame: int | None, radius: int | None, text_queries: bool
) -> tuple[int, int] | None:
    """Check the options that need row ranges; (tokens of a frame, radius) of the window form."""
    if not text_queries:
        expected = "offsets, which say where the text rows begin"
        require(offsets is not None, f"{op}: modality_offsets", expected, None)
    if frame is None and radius is None:
        return None
    ok = isinstance(frame, int) and 1 <= frame < 1 << 30
    require(ok, f"{op}: tokens_per_frame", "a positive integer with frame_window", repr(frame))
    ok = isinstance(radius, int) and 0 <= radius <= MAX_RADIUS
    require(ok, f"{op}: frame_window", f"0 to {MAX_RADIUS} with tokens_per_frame", repr(radius))
    require(offsets is not None, f"{op}: modality_offsets", "offsets, because there is a frame window", None)
    assert frame is not None
    assert radius is not None
    assert offsets is not None
    if offsets.device.type == "cpu":
        _check_frames(op, int(offsets[1]), frame)
    return frame, radius


def _check_frames(op: str, video: int, frame: int) -> None:
    require(video % frame == 0, f"{op}: tokens_per_frame", f"a divisor of the {video} video rows", frame)


def _choose(op: str, q: torch.Tensor, backend: AttentionBackend | None) -> AttentionBackend:
    if backend == "sdpa":
        return backend
    if backend == "flash_attn":
        _flash_attn_function()
        return backend
    expected = f"one of {(*BACKENDS, *LIBRARIES)} or None"
    require(backend is None or backend in BACKENDS, f"{op}: backend", expected, repr(backend))
    return choose_backend(op, q, backend)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's attention on (L, H, D), left to choose among its kernels."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)


def _flash_attn_function() -> Callable[..., Any]:
    """`flash_attn_func` of FlashAttention-3 where there is one, else of flash-attn."""
    for name in ("flash_attn_interface", "flash_attn"):
        try:
            function: Callable[..., Any] = import_module(name).flash_attn_func
            return function
        except ModuleNotFoundError as error:
            if error.name != name:  # it is there, and something that it needs is not
                raise
    raise RuntimeError("gated_attention: backend 'flash_attn': the package flash-attn is not installed")


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    result = _flash_attn_function()(*(x.unsqueeze(0) for x in (q, k, v)))
    # Some versions return the softmax's statistics as well.
    return (result[0] if isinstance(result, tuple) else result)[0]
