"""The matrix products in the simulator: every ending and both tiles against float64, under many schedules.

A schedule is one seed of the simulator: an order of events, with copies, products or threads that are late. Each ending
meets SCHEDULES of them with each tile.
"""

from __future__ import annotations

import pytest
import torch

from gemm_cases import KINDS, ROWS_AND_K, check, edge_case, expected, make_problem, run

SCHEDULES = 100
TILES = ("wide", "square")  # 128x256 in pairs of blocks, and 128x128


@pytest.mark.parametrize("index", range(len(ROWS_AND_K)))
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("kind", KINDS)
def test_against_float64(kind: str, tile: str, index: int) -> None:
    problem = edge_case(kind, tile, index)
    count = -(-SCHEDULES // len(ROWS_AND_K))
    first: dict[str, torch.Tensor] = {}
    for seed in range(index * count, (index + 1) * count):
        out = run(problem, seed=seed)
        if not first:
            first = out
            check(problem, out)
        for name, tensor in out.items():
            same = torch.equal(tensor.nan_to_num(12345), first[name].nan_to_num(12345))
            assert same, f"{name} depends on the schedule"


@pytest.mark.parametrize(
    ("kind", "n"), [("gemm_qkv", 7208), ("gemm_swiglu7", 27304), ("gemm_residual", 5120)]
)
def test_published_widths(kind: str, n: int) -> None:
    options = {"heads": (40, 8)} if kind == "gemm_qkv" else {"n": n, "d_cols": 13696}
    problem = make_problem(kind, (5,), 72, **options, num_sms=8)
    assert problem.n == n
    check(problem, run(problem, seed=3))


def test_without_offsets_all_rows_are_used() -> None:
    problem = make_problem("gemm", (130,), 72, n=136, spare=0, pass_offsets=False)
    check(problem, run(problem))


def test_bigger_grid_than_work_and_one_block_for_all() -> None:
    for num_sms in (1, 2, 3, 40):
        problem = make_problem("gemm", (200, 1, 90), 72, n=520, num_sms=num_sms)
        check(problem, run(problem, seed=num_sms))


def test_more_bands_of_tiles_than_one() -> None:
    # 17 rows of tiles or more: bands of 8 pairs, or of 16 tiles.
    for n, num_sms in ((264, 4), (40, 3)):
        problem = make_problem("gemm", (2200, 130, 0), 8, n=n, num_sms=num_sms)
        check(problem, run(problem, seed=num_sms))


def test_nan_and_infinity_stay_in_their_row() -> None:
    for kind in KINDS:
        options = {"heads": (2, 1)} if kind == "gemm_qkv" else {"n": 264}
        problem = make_problem(kind, (100,), 72, **options)
        problem.tensors["a"][40, 3] = float("nan")
        problem.tensors["a"][60, 5] = float("inf")
        for name, tensor in run(problem).items():
            columns = problem.d_cols if kind == "gemm_swiglu7" else tensor.shape[1]
            used = tensor[:100, : min(columns, problem.n)] if tensor.dim() == 2 else tensor[:100]
            assert used[40].isnan().all(), f"{kind}: {name} hides a NaN"
            others = torch.cat([used[:40], used[41:60], used[61:]])
            assert others.isfinite().all(), f"{kind}: {name}"


def test_the_check_can_fail() -> None:
    problem = make_problem("gemm", (130,), 72, n=136)
    good = {"d": expected(problem)["d"].bfloat16()}
    full = run(problem)
    check(problem, full)
    for row, column, value in ((129, 135, float("nan")), (0, 0, 9.0), (130, 0, 0.0), (4, 136, 0.0)):
        out = {"d": full["d"].clone()}
        out["d"][row, column] = value
        with pytest.raises(AssertionError):
            check(problem, out)
    worse = {"d": full["d"].clone()}
    worse["d"][:130, :136] = good["d"] * 1.004
    with pytest.raises(AssertionError):
        check(problem, worse)
