"""The matrix products on a Hopper GPU: the simulator's edge cases, and the model's own shapes."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from gemm_cases import KINDS, ROWS_AND_K, Problem, check, edge_case, isolate, make_problem, run
from mismatch import require_equal

pytestmark = pytest.mark.gpu

ROWS = {"256p": (3630, 80, 400), "one more than a tile": (4097, 0, 0)}
SQUARE_ROWS = (97, 8, 21)  # with the spare rows of a problem one row of tiles
TWO_ROUNDS = (20480, 27304)  # of all multiprocessors with square tiles, and pairs cost no more
# Kind, N (or heads), K: the layers of the published model.
LAYERS = (
    ("gemm_qkv", (40, 8), 5120),
    ("gemm_residual", 5120, 5120),
    ("gemm_swiglu7", 27304, 5120),
    ("gemm_residual", 5120, 13696),
    ("gemm_gelu7", 20480, 5120),
    ("gemm", 7168, 5120),
)


@pytest.mark.parametrize("index", range(len(ROWS_AND_K)))
@pytest.mark.parametrize("tile", ["wide", "square"])
@pytest.mark.parametrize("kind", KINDS)
def test_edge_cases(kind: str, tile: str, index: int) -> None:
    problem = edge_case(kind, tile, index, device="cuda")
    check(problem, run(problem, "gpu"))


def check_and_repeat(problem: Problem) -> None:
    """Against float64, and the same bits in three more runs."""
    first = run(problem, "gpu")
    check(problem, first)
    for count in range(2, 5):
        for name, tensor in run(problem, "gpu").items():
            more: dict[str, Any] = {"isolate": partial(isolate, problem), "facts": {"run": count}}
            require_equal(f"{name}:", tensor, first[name], rerun=partial(again, problem, name), **more)


def again(problem: Problem, name: str) -> torch.Tensor:
    return run(problem, "gpu")[name]


def model_problem(
    kind: str, size: int | tuple[int, int], k: int, grouped: bool, rows: tuple[int, ...], **options: Any
) -> Problem:
    shape = {"heads": size} if isinstance(size, tuple) else {"n": size, "d_cols": 13696}
    return make_problem(kind, rows if grouped else (sum(rows),), k, **shape, **options, device="cuda")


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("kind", "size", "k"), LAYERS)
def test_model_shapes_wide(
    kind: str, size: int | tuple[int, int], k: int, grouped: bool, rows: tuple[int, ...]
) -> None:
    check_and_repeat(model_problem(kind, size, k, grouped, rows, num_sms=0))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("kind", "size", "k"), LAYERS)
def test_model_shapes_square(kind: str, size: int | tuple[int, int], k: int, grouped: bool) -> None:
    # One row of tiles: up to 128 columns a multiprocessor the small ones fill the grid better; beyond, only the grid of
    # one block has no pairs.
    num_sms = 1 if size in TWO_ROUNDS else 0
    check_and_repeat(model_problem(kind, size, k, grouped, SQUARE_ROWS, num_sms=num_sms))
