"""The three ways to compute an operation, for tests that hold all of them to the same bounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from magihuman_fast.kernels import ops

BACKENDS = ["reference", "sim", pytest.param("gpu", marks=pytest.mark.gpu)]
# With multiprocessors for their grids: few, so that blocks take several units each, and on a GPU all as well (0).
GRIDS = [
    pytest.param("reference", 2, id="reference"),
    pytest.param("sim", 2, id="sim"),
    pytest.param("gpu", 2, id="gpu-few", marks=pytest.mark.gpu),
    pytest.param("gpu", 0, id="gpu-all", marks=pytest.mark.gpu),
]


def device_of(backend: ops.Backend) -> str:
    return "cuda" if backend == "gpu" else "cpu"


def runs(backend: ops.Backend, schedules: int) -> Iterator[int]:
    """One run, or in the simulator one under each of so many schedules."""
    for seed in range(schedules if backend == "sim" else 1):
        if backend == "sim":
            ops.simulator().set_seed(seed)
        yield seed


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """NaN everywhere, at a row pitch 8 elements wider than the rows."""
    return torch.full((*shape[:-1], shape[-1] + 8), torch.nan, dtype=dtype, device=device)[..., : shape[-1]]


def offsets_tensor(offsets: Sequence[int], device: str) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def beyond_rows(padded: torch.Tensor) -> torch.Tensor:
    """The elements between the rows of a `poisoned` tensor."""
    base = padded._base
    assert base is not None
    return base[..., padded.shape[-1] :]
