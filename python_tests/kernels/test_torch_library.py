"""The torch.library operators: schema, fake implementation and tracing, and that none is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from magihuman_fast.kernels import ops, torch_library
from operation_cases import VALID


def operator_arguments(op: str) -> tuple[Any, ...]:
    """The positional arguments of the torch.library operator for the same call."""
    arguments = VALID[op]()
    if op == "gemm_swiglu7":
        return (arguments["a"], arguments["w"], 24, arguments["modality_offsets"])
    if op == "head":
        arguments |= {"grid": [1, 4, 4], "audio_rows": 3}
    names = [a.name for a in getattr(torch.ops.magihuman_fast, op).default._schema.arguments]
    return tuple(arguments[name] for name in names)


@pytest.mark.parametrize("op", VALID)
def test_torch_library_operator(op: str) -> None:
    operator = getattr(torch.ops.magihuman_fast, op).default
    torch.library.opcheck(operator, operator_arguments(op))


def test_every_operation_has_its_operator() -> None:
    operators = {schema.split("(")[0] for schema, *_ in torch_library._OPERATORS}
    assert (
        operators
        == set(VALID)
        == {name for name in ops.__all__ if name.islower()}
        - {
            "gpu_unavailable",
            "simulator",
        }
    )
