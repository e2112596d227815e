"""The matrix products on a Hopper GPU: the simulator's edge cases, and the model's own shapes."""

from __future__ import annotations

import pytest
import torch

from gemm_cases import KINDS, ROWS_AND_K, check, edge_case, make_problem, run

pytestmark = pytest.mark.gpu

ROWS = {"256p": (3630, 80, 400), "one more than a tile": (4097, 0, 0)}
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


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("kind", "size", "k"), LAYERS)
def test_model_shapes(
    kind: str, size: int | tuple[int, int], k: int, grouped: bool, rows: tuple[int, ...]
) -> None:
    options = {"heads": size} if isinstance(size, tuple) else {"n": size, "d_cols": 13696}
    rows = rows if grouped else (sum(rows),)
    problem = make_problem(kind, rows, k, **options, num_sms=0, device="cuda")
    first = run(problem, "gpu")
    check(problem, first)
    for _ in range(3):
        for name, tensor in run(problem, "gpu").items():
            assert torch.equal(tensor.nan_to_num(12345), first[name].nan_to_num(12345)), name
