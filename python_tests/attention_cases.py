"""Gated attention for tests: problems with random data, their float64 result, and the call on every backend.

Rows that are not in use hold NaN, in every input: one that is read shows. Outputs are NaN beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from magihuman_fast.kernels import ops
from magihuman_fast.kernels.attention import TILES
from mismatch import outcomes, require_at_most, require_equal, require_finite

HEAD = 128


@dataclass
class Problem:
    """One call: its inputs, and whose the rows are."""

    rows: tuple[int, int, int]  # video, audio, text
    heads: tuple[int, int] = (1, 1)  # query, key and value
    window: tuple[int, int] | None = None  # video rows of a frame, frames seen on either side
    text_queries: bool = True
    spare: int = 5  # rows of the buffers beyond those in use
    scale: float = 1.0  # of queries and keys
    num_sms: int = 2  # fewer than there are units: blocks take several
    device: str = "cpu"
    seed: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        (hq, hkv), capacity = self.heads, self.live + self.spare
        # An outlier channel, as trained models have them.
        outlier = torch.ones(HEAD, device=self.device)
        outlier[7] = 4
        for name, heads, scale in (("q", hq, self.scale * outlier), ("k", hkv, self.scale), ("v", hkv, 1)):
            shape = (capacity, heads, HEAD)
            self.tensors[name] = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=self.device)
            self.tensors[name][: self.live] = torch.randn(self.live, heads, HEAD, **options) * scale
        self.tensors["gate"] = torch.full((capacity, hq), torch.nan, device=self.device)
        self.tensors["gate"][: self.live] = torch.randn(self.live, hq, **options) * 2
        video, audio, _ = self.rows
        offsets = (0, video, video + audio, self.live)
        self.tensors["modality_offsets"] = torch.tensor(offsets, dtype=torch.int32, device=self.device)

    @property
    def live(self) -> int:
        return sum(self.rows)

    @property
    def computed(self) -> int:
        """Rows of the output that are written."""
        return self.live if self.text_queries else self.rows[0] + self.rows[1]

    @property
    def options(self) -> dict[str, Any]:
        frame, radius = self.window or (None, None)
        return {
            "modality_offsets": self.tensors["modality_offsets"],
            "tokens_per_frame": frame,
            "frame_window": radius,
            "text_queries": self.text_queries,
        }

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.tensors[name] for name in ("q", "k", "v", "gate"))


def run(
    p: Problem, backend: ops.AttentionBackend = "sim", seed: int = 0, tile: str | None = None
) -> torch.Tensor:
    """The output of one call, NaN where it wrote nothing."""
    if backend == "sim":
        ops.simulator().set_seed(seed)
    out = torch.full_like(p.tensors["q"], torch.nan)
    options = {**p.options, "num_sms": p.num_sms, "tile": tile}
    return ops.gated_attention(*p.inputs, **options, out=out, backend=backend)


def visible(p: Problem, rows: torch.Tensor) -> torch.Tensor:
    """Which keys each of `rows` sees: (len(rows), live) bool, from the rule as MODEL.md states it."""
    keys = torch.arange(p.live, device=rows.device)
    if p.window is None:
        return torch.ones(len(rows), p.live, dtype=torch.bool, device=rows.device)
    (frame, radius), video = p.window, p.rows[0]
    near = (rows[:, None] // frame - keys // frame).abs() <= radius
    return near | (rows[:, None] >= video) | (keys >= video)


def expected(p: Problem, rows: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Those rows of the output (len(rows), Hq, 128), computed in `dtype`, not rounded."""
    q, k, v, gate = (t[: p.live].to(dtype) for t in p.inputs)
    hq, hkv = p.heads
    q = q[rows].unflatten(1, (hkv, hq // hkv))
    scores = torch.einsum("mgrd,ngd->grmn", q, k) / math.sqrt(HEAD)
    scores.masked_fill_(~visible(p, rows), -math.inf)
    o = torch.einsum("grmn,ngd->mgrd", scores.softmax(-1), v).flatten(1, 2)
    return o * torch.sigmoid(gate[rows]).unsqueeze(-1)


def isolate(p: Problem, tile: str | None = None, backend: ops.AttentionBackend = "gpu") -> dict[str, str]:
    """Which smaller problems hold: one tile of keys, one head, few multiprocessors; and the other tiles at this one."""
    kept, left = [], 128
    for count in p.rows:
        kept.append(min(count, left))
        left -= kept[-1]
    window = None if p.window is None else (min(p.window[0], max(kept[0], 1)), p.window[1])
    if window is not None and kept[0] % window[0]:
        window = (kept[0], window[1])

    def changed(tile: str | None = tile, **fields: Any) -> Callable[[], None]:
        def run_and_check() -> None:
            # With tensors of its own: they are drawn anew, and `p` keeps its own.
            q = replace(p, **{"tensors": {}, **fields})
            if q.computed <= 1024:
                check(q, run(q, backend, tile=tile), tile=tile)
                return
            rows = torch.linspace(0, q.computed - 1, 128, device=q.device).long().unique()
            check(q, run(q, backend, tile=tile), run(q, "sdpa"), rows, tile)

        return run_and_check

    # One of them has seconds of work with all heads at the largest size.
    few: dict[str, Any] = {} if p.live <= 8192 else {"heads": (p.heads[0] // p.heads[1], 1)}
    first = {"rows": tuple(kept), "window": window}
    tried = {
        "one key tile, one head": changed(heads=(1, 1), **first),
        "one key tile": changed(**first),
        "one key tile, no window": changed(rows=tuple(kept), window=None),
        "one head": changed(heads=(1, 1)),
        "on one multiprocessor, any tile": changed(None, num_sms=1, **few),
        "on two multiprocessors": changed(num_sms=2, **few),
    }
    return outcomes(tried | {f"the same with {other}": changed(other) for other in TILES if other != tile})


def check(
    p: Problem,
    out: torch.Tensor,
    baseline: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    tile: str | None = None,
) -> None:
    """Against float64: within twice PyTorch's bfloat16 error, overall and in the worst row of one head, which one wrong
    element of usual size spoils.

    `baseline`: the same computation in bfloat16 PyTorch. `rows`: the ones to look at, by default all. `tile`: what it
    ran with.
    """
    facts = {"rows": p.rows, "heads": p.heads, "window": p.window, "num_sms": p.num_sms, "tile": tile}
    more: dict[str, Any] = {"layout": "heads", "facts": facts}
    on_gpu = p.device == "cuda"
    beyond = torch.arange(p.computed, len(out))
    says = "rows that are not computed were written"
    require_equal("out:", out[p.computed :], torch.nan, says=says, numbers=beyond, **more)
    if p.computed == 0:
        return
    if on_gpu:
        more["isolate"] = partial(isolate, p, tile)
    require_finite(
        "out",
        out[: p.computed],
        rerun=(lambda: run(p, "gpu", tile=tile)[: p.computed]) if on_gpu else None,
        **more,
    )
    if rows is None:
        rows = torch.arange(p.computed, device=out.device)
    baseline = run(p, "reference") if baseline is None else baseline
    truth = expected(p, rows)
    error, allowed = ((x[rows].double() - truth) for x in (out, baseline))
    floor = 2.0**-10  # of a row: what rounding the result to bfloat16 costs, about
    if on_gpu:
        more["rerun"] = lambda: run(p, "gpu", tile=tile)[rows]
    more |= {"got": out[rows], "ref": truth, "numbers": rows}
    limit = 2 * allowed.norm() + floor * truth.norm()
    require_at_most("out:", error.norm(), limit, says="the error is over twice PyTorch's", **more)
    size = truth.norm(dim=-1)
    worst = (error.norm(dim=-1) / size).max()
    bound = 2 * (allowed.norm(dim=-1) / size).max() + floor
    # Of a row's own size: a row that is off as a whole shows as one.
    within = (2.0**-5 * size / HEAD**0.5).unsqueeze(-1).expand_as(truth)
    require_at_most("out:", worst, bound, says="one row is off, of its size by", bound=within, **more)


# Tiles have 128 queries, halves of 64, and 176 or 128 keys.
FULL: dict[str, dict[str, Any]] = {
    "one token": {"rows": (1, 0, 0)},
    "one token of each": {"rows": (1, 1, 1), "heads": (5, 1)},
    "half a tile": {"rows": (64, 0, 0)},
    "half a tile and one": {"rows": (60, 3, 2)},
    "queries - 1": {"rows": (127, 0, 0)},
    "queries": {"rows": (100, 20, 8)},
    "queries + 1": {"rows": (129, 0, 0)},
    "keys - 1": {"rows": (175, 0, 0)},
    "keys": {"rows": (170, 5, 1), "heads": (2, 1)},
    "keys + 1": {"rows": (0, 0, 177)},
    "two key tiles + 1": {"rows": (200, 100, 53), "heads": (2, 2)},
    "grouped 5:1": {"rows": (150, 10, 30), "heads": (10, 2)},
    "no video": {"rows": (0, 130, 20), "heads": (2, 1)},
    "without text queries": {"rows": (100, 40, 200), "heads": (2, 1), "text_queries": False},
    "nothing to compute": {"rows": (0, 0, 9), "text_queries": False},
    "no spare rows": {"rows": (131, 0, 0), "spare": 0},
    "much spare room": {"rows": (131, 0, 0), "spare": 300},
    "no rows": {"rows": (0, 0, 0)},
}
WINDOW: dict[str, dict[str, Any]] = {
    "radius 0": {"rows": (300, 9, 14), "window": (100, 0)},
    "radius 1, both ends of the clip": {"rows": (640, 20, 30), "window": (128, 1)},
    "radius 2": {"rows": (490, 5, 11), "window": (70, 2)},
    "radius beyond the clip": {"rows": (300, 9, 14), "window": (100, 1000)},
    "no audio": {"rows": (400, 0, 40), "window": (100, 1)},
    "no text": {"rows": (400, 40, 0), "window": (100, 1)},
    "video alone": {"rows": (400, 0, 0), "window": (100, 1)},
    "no video": {"rows": (0, 70, 80), "window": (100, 1)},
    "one frame": {"rows": (150, 3, 4), "window": (150, 1)},
    "one video token": {"rows": (1, 3, 4), "window": (1, 0)},
    "many frames in a tile": {"rows": (260, 3, 4), "window": (4, 3), "heads": (5, 1)},
    "much audio and text": {"rows": (256, 170, 200), "window": (64, 1)},
    "without text queries": {"rows": (300, 9, 140), "window": (100, 1), "text_queries": False},
    "grouped 5:1": {"rows": (210, 9, 14), "window": (70, 1), "heads": (5, 1)},
}
