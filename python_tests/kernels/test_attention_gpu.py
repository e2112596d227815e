"""Gated attention on a Hopper GPU: the simulator's cases, and the model's own sizes on sampled rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from attention_cases import FULL, WINDOW, Problem, check, isolate, run
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.attention import TILES
from mismatch import require, require_equal, require_finite
from workload import CLIPS, FRAME_WINDOW, Tokens

pytestmark = pytest.mark.gpu

CASES = [pytest.param(case, id=f"full: {name}") for name, case in FULL.items()]
CASES += [pytest.param(case, id=f"window: {name}") for name, case in WINDOW.items()]
SAMPLED_ROWS = 48
MODEL = [
    pytest.param(CLIPS[name], window, id=f"{name}, {'window' if window else 'full'}")
    for name, window in (("256p", False), ("540p", False), ("1080p", False), ("1080p", True))
]


def model_problem(clip: Tokens, window: bool, **options: Any) -> Problem:
    """The published heads over one clip's tokens."""
    frame = clip.video // clip.grid[0]
    rows = (clip.video, clip.audio, clip.text)
    return Problem(
        rows,
        heads=(40, 8),
        window=(frame, FRAME_WINDOW) if window else None,
        device="cuda",
        num_sms=0,
        **options,
    )


def sampled(p: Problem) -> torch.Tensor:
    """Rows at the edges of ranges, frames and tiles, and others at random."""
    video, audio, _ = p.rows
    edges = [0, video, video + audio, p.computed, 64, 128, p.computed // 128 * 128]
    if p.window is not None:
        edges += [p.window[0] * frame for frame in (1, 11, 12, 20, 31)]
    near = [edge + step for edge in edges for step in (-1, 0)]
    drawn = torch.randperm(p.computed, generator=torch.Generator().manual_seed(5))[:SAMPLED_ROWS]
    found = torch.unique(torch.cat([torch.tensor([r for r in near if 0 <= r < p.computed]), drawn]))
    return found.to(p.device)


def check_model(p: Problem) -> None:
    """Sampled rows against float64, and two runs equal bit for bit."""
    out = run(p, "gpu")
    check(p, out, run(p, "sdpa"), sampled(p))
    more = on_failure(p)
    for count in range(2, 5):
        require_equal("out:", run(p, "gpu"), out, layout="heads", facts={"run": count}, **more)


def on_failure(p: Problem) -> dict[str, Any]:
    """What is run again after one, on a GPU."""
    return {} if p.device != "cuda" else {"rerun": partial(run, p, "gpu"), "isolate": partial(isolate, p)}


# On all multiprocessors a block has one unit to do, on one or two it has several, of different lengths.
@pytest.mark.parametrize("num_sms", [0, 2])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", CASES)
def test_edge_cases(case: dict[str, Any], tile: str, num_sms: int) -> None:
    problem = Problem(**case, device="cuda", num_sms=num_sms)
    check(problem, run(problem, "gpu", tile=tile), tile=tile)


@pytest.mark.parametrize("rows", [(100, 0, 0), (170, 0, 0), (1000, 40, 300)])
@pytest.mark.parametrize("num_sms", [4, 0])
@pytest.mark.parametrize("tile", TILES)
def test_many_units_a_block(rows: tuple[int, int, int], tile: str, num_sms: int) -> None:
    # Of one key tile each, and of many: 40 to 440 query tiles.
    problem = Problem(rows, heads=(40, 8), device="cuda", num_sms=num_sms)
    check(problem, run(problem, "gpu", tile=tile), tile=tile)


@pytest.mark.parametrize("window", [False, True], ids=["full", "window"])
@pytest.mark.parametrize("tile", TILES)
def test_every_tile_at_the_models_size(tile: str, window: bool) -> None:
    p = model_problem(CLIPS["256p"], window)
    check(p, run(p, "gpu", tile=tile), run(p, "sdpa"), sampled(p), tile=tile)


def test_without_offsets_all_rows_are_used() -> None:
    problem = Problem((1300, 0, 0), heads=(5, 1), spare=0, device="cuda")
    check(problem, ops.gated_attention(*problem.inputs))


def test_nan_stays_in_its_row_and_head() -> None:
    problem = Problem((700, 3, 4), heads=(4, 2), device="cuda")
    problem.tensors["q"][40, 1] = torch.nan
    problem.tensors["v"][7, 1] = torch.nan
    out = run(problem, "gpu")[: problem.live]
    says = "is not all NaN"
    require_equal("the row with a NaN", out[40:41, 1:2], torch.nan, layout="heads", says=says)
    require_equal("heads of a value with a NaN", out[:, 2:], torch.nan, layout="heads", says=says)
    out[40, 1] = 0
    require_finite("other heads", out[:, :2], layout="heads")


def test_offsets_that_do_not_fit_leave_no_buffer() -> None:
    problem = Problem((700, 30, 40), window=(70, 1), device="cuda", spare=0)
    whole = torch.full(
        (len(problem.tensors["q"]) + 300, 1, 128), torch.nan, dtype=torch.bfloat16, device="cuda"
    )
    out = whole[: problem.live]
    problem.tensors["modality_offsets"].copy_(torch.tensor([0, 980, 1000, 1010], dtype=torch.int32))
    ops.gated_attention(*problem.inputs, **problem.options, out=out)
    says = "rows beyond the buffer were written"
    require_equal("out:", whole[problem.live :], torch.nan, layout="heads", says=says)


def replayed(graph: torch.cuda.CUDAGraph, out: torch.Tensor) -> Callable[[], torch.Tensor]:
    """What a replay writes, beside what `out` held."""

    def rerun() -> torch.Tensor:
        before = out.clone()
        out.fill_(torch.nan)
        graph.replay()
        found = out.clone()
        out.copy_(before)
        return found

    return rerun


@pytest.mark.parametrize(("clip", "window"), MODEL)
def test_model_sizes(clip: Tokens, window: bool) -> None:
    check_model(model_problem(clip, window))
    torch.cuda.empty_cache()


@pytest.mark.parametrize("window", [False, True])
def test_without_text_queries(window: bool) -> None:
    check_model(model_problem(CLIPS["256p"], window, text_queries=False, spare=300))


@pytest.mark.parametrize("scale", [15.0, 48.0])
def test_extreme_logits(scale: float) -> None:
    check_model(model_problem(CLIPS["256p"], False, scale=scale))


def test_captured_equals_launched_and_serves_another_text() -> None:
    p = model_problem(CLIPS["256p"], True)
    launched = run(p, "gpu")
    out, offsets = torch.full_like(launched, torch.nan), p.tensors["modality_offsets"].clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ops.gated_attention(*p.inputs, **p.options, out=out)
    graph.replay()
    more: dict[str, Any] = {"layout": "heads", "says": "captured and launched differ"}
    require_equal("out:", out, launched, rerun=replayed(graph, out), **more)
    # A shorter text: the same graph, other numbers in device memory.
    p.tensors["modality_offsets"][3] -= 133
    out.fill_(torch.nan)
    graph.replay()
    again = run(p, "gpu")
    require_equal("out with a shorter text:", out, again, rerun=replayed(graph, out), **more)
    require(not torch.equal(again[0], launched[0]), "a shorter text changed nothing")
    p.tensors["modality_offsets"].copy_(offsets)
