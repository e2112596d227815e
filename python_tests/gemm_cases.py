"""The matrix products for tests: problems with random data, their float64 result, and the call through the simulator.

Outputs are NaN beforehand, in allocations a few rows longer than the problem, so that whatever is not written, or is
written too far, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from magihuman_fast.kernels import ops
from mismatch import (
    Facts,
    outcomes,
    require_at_most,
    require_close,
    require_equal,
    require_finite,
    rounding_bound,
)

HEAD = 128
ROTATED = 48
EPS = 1e-6
UNTOUCHED = 7.0  # around the residual stream, where an addition to NaN would not show
SPARE_ROWS = 3  # rows of every output that lie beyond the problem
KINDS = ("gemm", "gemm_residual", "gemm_gelu7", "gemm_swiglu7", "gemm_qkv")

# Rows of each range (one number: dense, no experts), and K. Tiles have 128 rows, halves of 64; K goes by
# 64, and the ring has 4 or 6 stages.
ROWS_AND_K: tuple[tuple[tuple[int, ...], int], ...] = (
    ((1,), 64),
    ((127,), 72),
    ((129,), 136),
    ((257,), 203),
    ((320,), 8),
    ((190,), 520),
    ((130, 70, 33), 72),
    ((0, 129, 5), 64),
    ((65, 0, 200), 72),
    ((3, 128, 0), 200),
    ((0, 0, 66), 72),
    ((0, 140, 0), 64),
    ((20, 0, 0), 328),
    ((0, 0, 0), 64),
)


@dataclass
class Problem:
    """One call: its inputs, and the rows of each range."""

    kind: str
    rows: tuple[int, ...]  # one number: a dense product; three: grouped by modality
    n: int
    k: int
    capacity: int  # rows of the buffers; those beyond sum(rows) hold NaN
    num_sms: int = 4
    pass_offsets: bool = True
    d_cols: int = 0  # SwiGLU7
    heads: tuple[int, int] = (0, 0)  # QKV: query, key and value
    device: str = "cpu"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        return len(self.rows)

    @property
    def live(self) -> int:
        return sum(self.rows)


def aligned(*shape: int, dtype: torch.dtype, fill: float = float("nan"), device: str = "cpu") -> torch.Tensor:
    """A tensor on a 128-byte boundary."""
    count, size = 1, torch.empty((), dtype=dtype).element_size()
    for extent in shape:
        count *= extent
    storage = torch.full((count + 128 // size,), fill, dtype=dtype, device=device)
    start = -storage.data_ptr() % 128 // size
    return storage[start : start + count].view(shape)


def make_problem(
    kind: str,
    rows: tuple[int, ...],
    k: int,
    *,
    n: int = 0,
    heads: tuple[int, int] = (0, 0),
    d_cols: int = 0,
    spare: int = 2,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A problem with normal data: products of variance one, clamps that are reached, NaN in rows beyond the ranges.

    Drawn where it is used: other numbers on a GPU than on a CPU, of which there may be billions.
    """
    if kind == "gemm_qkv":
        n = HEAD * (heads[0] + 2 * heads[1]) + heads[0]
    p = Problem(kind, rows, n, k, sum(rows) + spare, heads=heads, d_cols=d_cols or (n + 1) // 2, **options)
    drawn: dict[str, Any] = {"generator": torch.Generator(p.device).manual_seed(seed), "device": p.device}
    padded = partial(aligned, device=p.device)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        out = padded(*shape, dtype=dtype)
        out.copy_(torch.randn(*shape, **drawn) * scale)
        return out

    pitch = (k + 7) // 8 * 8
    # NaN between the rows too: a K tail that is read instead of masked would show.
    p.tensors["a"] = padded(p.capacity, pitch + 8, dtype=torch.bfloat16)
    p.tensors["a"][: p.live, :k] = torch.randn(p.live, k, **drawn).bfloat16()
    p.tensors["w"] = padded(p.groups * n, pitch, dtype=torch.bfloat16)
    strength = 4.0 if kind in ("gemm_gelu7", "gemm_swiglu7") else 1.0
    w = torch.randn(p.groups * n, k, **drawn) * (strength / k**0.5)
    p.tensors["w"][:, :k] = w.bfloat16()
    bounds = [0, *torch.tensor(rows).cumsum(0).tolist()]
    p.tensors["offsets"] = torch.tensor(bounds if p.groups == 3 else [0, 0, 0, p.live], dtype=torch.int32)
    if kind == "gemm_residual":
        p.tensors["x"] = normal(p.capacity, n)
    if kind == "gemm_qkv":
        p.tensors["q_norm"] = normal(p.groups, HEAD, scale=0.2)
        p.tensors["k_norm"] = normal(p.groups, HEAD, scale=0.2)
        angles = torch.rand(p.capacity, ROTATED, **drawn) * 6.3
        p.tensors["rope"] = padded(p.capacity, 2 * ROTATED, dtype=torch.float32)
        p.tensors["rope"].copy_(torch.cat([angles.sin(), angles.cos()], 1))
    p.tensors = {name: t.to(p.device) for name, t in p.tensors.items()}
    return p


def edge_case(kind: str, tile: str, index: int, *, device: str = "cpu") -> Problem:
    """Rows and K number `index`, in a width that gets `tile` (test_gemm_tiles.py holds the choice to it)."""
    rows, k = ROWS_AND_K[index]
    wide = tile == "wide"
    options: dict[str, Any] = {"num_sms": 2 if wide else 1, "seed": index, "device": device}
    if kind == "gemm_qkv":
        # Gates in a narrow tile of their own after 4 heads, or beside the last of 7 (3 for the square tile: narrow).
        heads = (((2, 1), (5, 1)) if wide else ((1, 1), (2, 1)))[index % 2]
        return make_problem(kind, rows, k, heads=heads, **options)
    # Ragged: 514 = 2 x 256 + 2 as 7208 = 28 x 256 + 40; and odd widths, for which SwiGLU7 has no use.
    n = (514, 296, 511)[index % 3] if wide else (100, 129, 56)[index % 3]
    if kind == "gemm_swiglu7":
        n = n // 2 * 2
    d_cols = n // 2 + (0, 1, 44, 140)[index % 4]
    return make_problem(kind, rows, k, n=n, d_cols=d_cols, **options)


def outputs_of(p: Problem) -> dict[str, torch.Tensor]:
    """Fresh outputs: NaN, or for the residual stream its value, with `SPARE_ROWS` rows beyond the capacity."""
    rows, padded = p.capacity + SPARE_ROWS, partial(aligned, device=p.device)
    if p.kind == "gemm_qkv":
        hq, hkv = p.heads
        shapes = {"q": (hq, HEAD), "k": (hkv, HEAD), "v": (hkv, HEAD)}
        out = {name: padded(rows, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        out["gate"] = padded(rows, hq, dtype=torch.float32)
    elif p.kind == "gemm_residual":
        x = padded(rows, (p.n + 3) // 4 * 4 + 4, dtype=torch.float32, fill=UNTOUCHED)
        x[: p.live, : p.n] = p.tensors["x"][: p.live]
        out = {"x": x}
    else:
        columns = p.d_cols if p.kind == "gemm_swiglu7" else p.n
        out = {"d": padded(rows, (columns + 7) // 8 * 8 + 8, dtype=torch.bfloat16)}
    return out


def run(p: Problem, backend: ops.Backend = "sim", seed: int = 0) -> dict[str, torch.Tensor]:
    """The outputs of one call, with the rows and columns around them."""
    if backend == "sim":
        ops.simulator().set_seed(seed)
    whole, t = outputs_of(p), p.tensors
    out = {name: tensor[: p.capacity] for name, tensor in whole.items()}
    options: dict[str, Any] = {
        "modality_offsets": t["offsets"] if p.pass_offsets else None,
        "num_sms": p.num_sms,
        "backend": backend,
    }
    a, w = t["a"][:, : p.k], t["w"].unflatten(0, (p.groups, p.n))[..., : p.k]
    if p.kind == "gemm_qkv":
        arguments = (a, w, t["q_norm"], t["k_norm"], t["rope"])
        heads = dict(zip(("num_q_heads", "num_kv_heads"), p.heads, strict=True))
        ops.gemm_qkv(*arguments, **heads, out=ops.QkvGate(**out), **options)
    elif p.kind == "gemm_residual":
        ops.gemm_residual(a, w, out["x"][:, : p.n], **options)
    else:
        columns = p.d_cols if p.kind == "gemm_swiglu7" else p.n
        getattr(ops, p.kind)(a, w, out=out["d"][:, :columns], **options)
    return whole


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.bfloat16().to(dtype)


def _activate(kind: str, u: torch.Tensor) -> torch.Tensor:
    gate, linear = (u, None) if kind == "gemm_gelu7" else (u[:, 0::2], u[:, 1::2])
    g = gate.clamp(max=7)
    y = g * torch.sigmoid(1.702 * g)
    return y if linear is None else y * (linear.clamp(-7, 7) + 1)


def expected(p: Problem, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """The live rows of every output, unrounded at the end, computed in `dtype` with the kernels' one inner rounding.

    With float64 this is the truth; with float32 it is the computation in PyTorch as the model does it: on a GPU with
    cuBLAS's bfloat16 product, whose sums the tensor cores take as they take the kernels'.
    """
    t, bounds = p.tensors, [0, *torch.tensor(p.rows).cumsum(0).tolist()]
    parts = []
    for g, (a, b) in enumerate(pairwise(bounds)):
        left, right = t["a"][a:b, : p.k], t["w"][g * p.n : (g + 1) * p.n, : p.k]
        if p.device == "cpu" or dtype == torch.float64:
            left, right = left.to(dtype), right.to(dtype)
        parts.append((left @ right.T).to(dtype))
    product = _round(torch.cat(parts), dtype)
    if p.kind == "gemm":
        return {"d": product}
    if p.kind == "gemm_residual":
        return {"x": t["x"][: p.live].to(dtype) + product}
    if p.kind in ("gemm_gelu7", "gemm_swiglu7"):
        d = _activate(p.kind, product)
        columns = p.d_cols if p.kind == "gemm_swiglu7" else p.n
        return {"d": torch.nn.functional.pad(d, (0, columns - d.shape[1]))}
    hq, hkv = p.heads
    q, k, v, gate = product.split([hq * HEAD, hkv * HEAD, hkv * HEAD, hq], 1)
    group = torch.repeat_interleave(torch.arange(p.groups), torch.tensor(p.rows)).to(p.device)
    sin, cos = (x.unsqueeze(1) for x in t["rope"][: p.live].to(dtype).split(ROTATED, 1))

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.unflatten(1, (-1, HEAD))
        x = (
            x
            * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
            * (1 + weight.to(dtype))[group].unsqueeze(1)
        )
        first, second = x[..., :ROTATED], x[..., ROTATED : 2 * ROTATED]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * ROTATED :]], -1)

    return {
        "q": normed(q, t["q_norm"]),
        "k": normed(k, t["k_norm"]),
        "v": v.unflatten(1, (-1, HEAD)),
        "gate": gate,
    }


def rounded(p: Problem, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`values` as the outputs store them."""
    exact = {"x", "gate"}
    return {name: v.float() if name in exact else v.bfloat16() for name, v in values.items()}


def isolate(p: Problem, backend: ops.Backend = "gpu") -> dict[str, str]:
    """Which smaller problems of the same kind hold: one block of K, one tile, few multiprocessors (one gets the square
    tile)."""
    kept, left = [], 128
    for count in p.rows:
        kept.append(min(count, left))
        left -= kept[-1]
    # One head of each, or the columns of the widest tile.
    small: dict[str, Any] = {"heads": (1, 1)} if p.kind == "gemm_qkv" else {"n": min(p.n, 256)}
    same: dict[str, Any] = {"heads": p.heads} if p.kind == "gemm_qkv" else {"n": p.n, "d_cols": p.d_cols}
    options: dict[str, Any] = {"num_sms": p.num_sms, "device": p.device}

    def drawn(rows: tuple[int, ...], k: int, **changed: Any) -> Callable[[], None]:
        return lambda: run_and_check(make_problem(p.kind, rows, k, **options | changed), backend)

    def on(num_sms: int) -> Callable[[], None]:
        q = replace(p, num_sms=num_sms)
        return (
            (lambda: run_and_check(q, backend)) if p.tensors else drawn(p.rows, p.k, **same, num_sms=num_sms)
        )

    one_block = min(p.k, 64)
    return outcomes(
        {
            "one tile, one K block": drawn(tuple(kept), one_block, **small),
            "one tile": drawn(tuple(kept), p.k, **small),
            "one K block": drawn(p.rows, one_block, **same),
            "the same on one multiprocessor": on(1),
            "the same on two multiprocessors": on(2),
        }
    )


def run_and_check(p: Problem, backend: ops.Backend) -> None:
    check(p, run(p, backend))


def check(
    p: Problem,
    out: Mapping[str, torch.Tensor],
    *,
    numbers: torch.Tensor | None = None,
    isolated: Callable[[], Facts] | None = None,
) -> None:
    """Against float64: within twice PyTorch's error in norm, and no element off by more than roundings explain.

    numbers: which rows these are of a larger problem. isolated: instead of `isolate`, where `p` is not what ran.
    """
    truth, baseline = expected(p), rounded(p, expected(p, torch.float32))
    on_gpu = p.device == "cuda"
    if isolated is None and on_gpu:
        isolated = partial(isolate, p)
    facts = {"kind": p.kind, "rows": p.rows, "n": p.n, "k": p.k, "num_sms": p.num_sms}
    fill = UNTOUCHED if p.kind == "gemm_residual" else torch.nan

    def again(name: str, columns: int) -> torch.Tensor:
        found = run(p, "gpu")[name][: p.live]
        return found[:, :columns] if found.dim() == 2 else found

    for name, ref in truth.items():
        got = out[name][: p.live]
        says = "rows beyond the ranges were written"
        beyond = torch.arange(p.live, len(out[name]))
        require_equal(f"{name}:", out[name][p.live :], fill, says=says, numbers=beyond, facts=facts)
        if p.live == 0:
            continue
        if got.dim() == 2:
            got, rest = got[:, : ref.shape[1]], got[:, ref.shape[1] :]
            says = "columns beyond the last one were written"
            require_equal(f"{name}:", rest, fill, says=says, numbers=numbers, facts=facts)
        more: dict[str, Any] = {"numbers": numbers, "facts": facts, "isolate": isolated}
        if on_gpu:
            more["rerun"] = partial(again, name, ref.shape[1])
        require_finite(name, got, **more)
        bound = rounding_bound(ref)
        error, allowed = (got.double() - ref).norm(), (baseline[name].double() - ref).norm()
        # A sum in another order may round the product the other way: one unit of bf16, 2^-8 of its size, for the few,
        # and where there are few elements (gates) for one of them.
        limit = 2 * allowed + 2.0**-12 * ref.norm() + 2.0**-8 * ref.abs().max()
        says = "has an error over twice PyTorch's"
        require_at_most(name, error, limit, says=says, got=got, ref=ref, bound=bound, **more)
        require_close(name, got, ref, bound, says="is off by more than rounding explains", **more)
