"""Matrix products with their fused endings, checked and launched; see `ops`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..model import operations as reference
from ..model.dit import Offsets
from ..model.operations import QkvGate
from .launch import Backend, check_groups, choose_backend, host_ranges, launch, output_or_new
from .tensor_checks import check_disjoint, check_tensor, require, row_pitch

HEAD_DIM = 128
ROPE_WIDTH = 96  # 48 sines, then 48 cosines
BF16, F32 = torch.bfloat16, torch.float32


def _check_product(op: str, a: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor | None) -> dict[str, int]:
    """Check what all products share; the numbers that their launchers take."""
    require(isinstance(a, torch.Tensor), f"{op}: a", "a torch.Tensor", type(a).__name__)
    check_tensor(f"{op}: a", a, (None, None), BF16, a.device, pitched=True)
    check_tensor(f"{op}: w", w, (None, None, a.shape[1]), BF16, a.device, pitched=True)
    require(a.shape[1] > 0 and w.shape[1] > 0, f"{op}: w", "at least one row and column", tuple(w.shape))
    groups = check_groups(op, w, offsets, len(a), a.device)
    return {
        "lda": row_pitch(a),
        "ldw": row_pitch(w),
        "m": len(a),
        "n": w.shape[1],
        "k": a.shape[1],
        "groups": groups,
    }


def _product_to_bf16(
    op: str,
    on_reference: Callable[[torch.Tensor, torch.Tensor, Offsets, torch.Tensor], None],
    a: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor | None,
    out: torch.Tensor | None,
    num_sms: int,
    backend: Backend | None,
) -> torch.Tensor:
    """A product whose result has its own shape (M, N), bfloat16."""
    numbers = _check_product(op, a, w, offsets)
    chosen = choose_backend(op, a, backend)
    out = output_or_new(f"{op}: out", out, (len(a), w.shape[1]), BF16, a)
    check_disjoint(f"{op}: out", out, a, "a")
    if chosen == "reference":
        on_reference(a, w, host_ranges(offsets, len(a)), out)
    elif len(a):
        tensors = {"a": a, "w": w, "modality_offsets": offsets, "d": out}
        launch(chosen, op, tensors, **numbers, ldd=row_pitch(out), num_sms=num_sms)
    return out


def gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    *,
    modality_offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """out = bf16(a wT): a (M, K) and w (1 or 3, N, K) bfloat16, out (M, N) bfloat16."""
    return _product_to_bf16("gemm", reference.gemm, a, w, modality_offsets, out, num_sms, backend)


def gemm_residual(
    a: torch.Tensor,
    w: torch.Tensor,
    x: torch.Tensor,
    *,
    modality_offsets: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """x += bf16(a wT): a (M, K) and w (1 or 3, N, K) bfloat16, x (M, N) float32, changed in place."""
    numbers = _check_product("gemm_residual", a, w, modality_offsets)
    chosen = choose_backend("gemm_residual", a, backend)
    check_tensor("gemm_residual: x", x, (len(a), w.shape[1]), F32, a.device, pitched=True)
    if chosen == "reference":
        reference.gemm_residual(a, w, host_ranges(modality_offsets, len(a)), x)
    elif len(a):
        tensors = {"a": a, "w": w, "modality_offsets": modality_offsets, "x": x}
        launch(chosen, "gemm_residual", tensors, **numbers, ldx=row_pitch(x), num_sms=num_sms)
    return x


def gemm_gelu7(
    a: torch.Tensor,
    w: torch.Tensor,
    *,
    modality_offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """out = bf16(gelu7(bf16(a wT))): a (M, K) and w (1 or 3, N, K) bfloat16, out (M, N) bfloat16."""
    return _product_to_bf16("gemm_gelu7", reference.gemm_gelu7, a, w, modality_offsets, out, num_sms, backend)


def gemm_swiglu7(
    a: torch.Tensor,
    w: torch.Tensor,
    *,
    modality_offsets: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> torch.Tensor:
    """out = bf16(swiglu7(bf16(a wT))): a (M, K) and w (1 or 3, 2W, K) bfloat16; even rows of w gate, odd ones linear.

    out (M, at least W) bfloat16: its columns from W on become zero (the next product's padding).
    """
    op = "gemm_swiglu7"
    numbers = _check_product(op, a, w, modality_offsets)
    chosen = choose_backend(op, a, backend)
    require(w.shape[1] % 2 == 0, f"{op}: w", "an even number of rows", tuple(w.shape))
    width = w.shape[1] // 2
    wider = isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] > width
    columns = out.shape[1] if wider and out is not None else width
    out = output_or_new(f"{op}: out", out, (len(a), columns), BF16, a)
    check_disjoint(f"{op}: out", out, a, "a")
    if chosen == "reference":
        reference.gemm_swiglu7(a, w, host_ranges(modality_offsets, len(a)), out)
    elif len(a):
        tensors = {"a": a, "w": w, "modality_offsets": modality_offsets, "d": out}
        pitch = row_pitch(out)
        launch(chosen, op, tensors, **numbers, ldd=pitch, d_cols=columns, num_sms=num_sms)
    return out


def gemm_qkv(
    a: torch.Tensor,
    w: torch.Tensor,
    q_norm: torch.Tensor,
    k_norm: torch.Tensor,
    rope: torch.Tensor,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    modality_offsets: torch.Tensor | None = None,
    out: QkvGate | None = None,
    num_sms: int = 0,
    backend: Backend | None = None,
) -> QkvGate:
    """The attention projection with its per-head norms and rotation, ready for attention.

    Args:
        a: (M, K) bfloat16. w: (E, N, K) bfloat16, E 1 or 3, N = 128 (Hq + 2 Hkv) + Hq: rows q, k, v, gate.
        q_norm, k_norm: (E, 128) float32, offset from 1.
        rope: (M, 96) float32, sines then cosines: channel pairs (i, i + 48) rotate, 96 .. 127 stay.
        out: contiguous tensors to write.
    """
    op = "gemm_qkv"
    numbers = _check_product(op, a, w, modality_offsets)
    chosen = choose_backend(op, a, backend)
    for name, heads in (("num_q_heads", num_q_heads), ("num_kv_heads", num_kv_heads)):
        require(isinstance(heads, int) and heads >= 1, f"{op}: {name}", "a positive integer", repr(heads))
    rows = HEAD_DIM * (num_q_heads + 2 * num_kv_heads) + num_q_heads
    expected = f"{rows} rows for {num_q_heads} query and {num_kv_heads} key/value heads"
    require(w.shape[1] == rows, f"{op}: w", expected, w.shape[1])
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        check_tensor(f"{op}: {name}", norm, (len(w), HEAD_DIM), F32, a.device)
    check_tensor(f"{op}: rope", rope, (len(a), ROPE_WIDTH), F32, a.device)
    shapes = [(len(a), heads, HEAD_DIM) for heads in (num_q_heads, num_kv_heads, num_kv_heads)]
    if out is None:
        parts = [torch.empty(shape, dtype=BF16, device=a.device) for shape in shapes]
        gate = torch.empty(len(a), num_q_heads, dtype=F32, device=a.device)
        out = QkvGate(parts[0], parts[1], parts[2], gate)
    for name, part, shape in zip("qkv", out, shapes, strict=False):
        check_tensor(f"{op}: out.{name}", part, shape, BF16, a.device)
    check_tensor(f"{op}: out.gate", out.gate, (len(a), num_q_heads), F32, a.device)
    if chosen == "reference":
        reference.gemm_qkv(a, w, q_norm, k_norm, rope, host_ranges(modality_offsets, len(a)), out)
    elif len(a):
        tensors = {
            "a": a,
            "w": w,
            "modality_offsets": modality_offsets,
            "q_norm": q_norm,
            "k_norm": k_norm,
            "rope": rope,
            "q": out.q,
            "k_out": out.k,
            "v": out.v,
            "gate": out.gate,
        }
        heads_of = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads}
        launch(chosen, op, tensors, **numbers, **heads_of, num_sms=num_sms)
    return out
