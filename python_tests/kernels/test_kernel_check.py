"""Kernels against PyTorch: every case on every backend, and faults that must be found."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from backends import BACKENDS, device_of
from magihuman_fast.kernels import attention, convolutions, ops, pointwise, products
from magihuman_fast.kernels.self_check import child
from magihuman_fast.kernels.self_check.cases import CASES
from magihuman_fast.kernels.self_check.child import check_in_turn, check_kernel
from magihuman_fast.kernels.self_check.comparison import EXACT, ON_GPU, TO_BF16, TO_F32, Case, Draw, compare

CPU = torch.device("cpu")
# The options and types of `ops`, and what only benchmarks use: every other name there is a kernel of a model's.
NO_KERNELS = {
    "AttentionBackend",
    "Backend",
    "ConvOptions",
    "PixelOutputs",
    "QkvGate",
    "gemm",
    "gpu_unavailable",
    "simulator",
}
THREE = ("rms_norm (one expert)", "head", "renoise_step")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(CASES))
def test_every_kernel_is_right(name: str, backend: ops.Backend) -> None:
    found = check_kernel(name, torch.device(device_of(backend)), backend)
    assert (found.kernel, found.verdict, found.detail) == (name, "right", "")
    assert found.error is not None
    assert found.allowed is not None
    assert found.error <= found.allowed


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_calls_of_a_gpus_sizes_are_valid(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test without a GPU computes them: here they come as far as the launch."""
    launched: list[str] = []
    for module in (attention, convolutions, products, pointwise):
        monkeypatch.setattr(module, "launch", lambda backend, op, *_, **__: launched.append(op))
    getattr(ops, case.operation)(**case.arguments(Draw(CPU, ON_GPU)), backend="sim")
    assert launched == [case.operation]


def test_every_kernel_has_a_case() -> None:
    assert {case.operation for case in CASES.values()} == set(ops.__all__) - NO_KERNELS
    decoder = {case.operation for case in CASES.values() if case.part == "decoder"}
    assert decoder == {op for op in ops.__all__ if op.startswith("conv_")} | {"channel_norm", "latent_pixels"}


# --- what is found --------------------------------------------------------------------------------------------

Damage = Callable[[Any, int], None]


def plant(monkeypatch: pytest.MonkeyPatch, op: str, damage: Damage) -> None:
    """The simulated kernel does its work, then `damage` is done to its outputs; PyTorch's stay as they are."""
    real, runs = getattr(ops, op), []

    def broken(*args: Any, backend: ops.Backend, **options: Any) -> Any:
        result = real(*args, **options, backend=backend)
        if backend == "sim":
            runs.append(op)
            damage(result, len(runs))
        return result

    monkeypatch.setattr(ops, op, broken)


def one_off(out: torch.Tensor, run: int) -> None:
    out.flatten()[17] += 0.25


def one_missing(out: torch.Tensor, run: int) -> None:
    out.flatten()[17] = torch.nan


def one_infinite(out: torch.Tensor, run: int) -> None:
    out.flatten()[17] = torch.inf


def row_beyond(out: torch.Tensor, run: int) -> None:
    out[-1, 3] = 0


def fickle(out: torch.Tensor, run: int) -> None:
    out.flatten()[17] += 2**-9 * run * out.flatten()[17].abs().clamp(min=2**-3)


def refuses(out: torch.Tensor, run: int) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a hint")


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (one_off, "differs from PyTorch"),
        (one_missing, "1 of 17152 elements are missing or no numbers"),
        (one_infinite, "infinite elements"),
        (row_beyond, "1 elements beyond the result were written"),
        (fickle, "two runs differ from one another"),
        (refuses, "RuntimeError: CUDA error: an illegal memory access was encountered"),
    ],
)
def test_faults_are_found(damage: Damage, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "rms_norm", damage)
    found = check_kernel("rms_norm (by modality)", CPU, "sim")
    assert (found.verdict, found.detail) == ("wrong", detail)
    if damage is one_off:
        assert found.error == pytest.approx(0.25, rel=0.1)
        assert found.allowed is not None
        assert found.allowed < 0.1


def test_bytes_that_nobody_wrote_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold no NaN: the two runs begin with different ones, one of them with what black pixels are."""
    kept: list[torch.Tensor] = []

    def forget_what_is_black(out: torch.Tensor, run: int) -> None:
        before, black = kept.pop(), out == 0
        assert black.any()
        out[black] = before[black]

    real = ops.conv_picture

    def broken(*args: Any, out: torch.Tensor, backend: ops.Backend, **options: Any) -> torch.Tensor:
        kept.append(out.clone())
        return real(*args, out=out, backend=backend, **options)

    monkeypatch.setattr(ops, "conv_picture", broken)
    plant(monkeypatch, "conv_picture", forget_what_is_black)
    found = check_kernel("conv_picture (bytes)", CPU, "sim")
    assert (found.verdict, found.detail) == ("wrong", "two runs differ from one another")


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "AcceleratorError: CUDA error: out of memory"),
        (RuntimeError("a call failed:\nCUBLAS_STATUS_ALLOC_FAILED"), "RuntimeError: a call failed:"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_little_memory_is_no_fault(error: Exception, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(out: torch.Tensor, run: int) -> None:
        raise error

    plant(monkeypatch, "rms_norm", damage)
    found = check_kernel("rms_norm (one expert)", CPU, "sim")
    assert (found.verdict, found.detail) == ("unchecked", detail)


def test_bounds() -> None:
    ref = torch.tensor([4.0, 0.0, 0.0, 0.0])  # rms 2
    for bound, at_zero in ((TO_BF16, 2.0**-4), (TO_F32, 2.0**-13)):
        assert compare(ref + at_zero, ref, bound).wrong is None
        found = compare(ref + torch.tensor([0, 0, 1.1 * at_zero, 0]), ref, bound)
        assert (found.wrong, found.allowed) == ("differs from PyTorch", at_zero)
    step = torch.tensor([3], dtype=torch.int32)
    assert compare(step, step.clone(), EXACT).wrong is None
    assert compare(step, step + 1, EXACT).wrong == "differs from PyTorch"


@pytest.mark.parametrize("usable", [True, False])
def test_a_fault_that_spoils_the_device_ends_the_child(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked after it, in the same process, would only fail with it."""
    plant(monkeypatch, "head", refuses)
    monkeypatch.setattr(child, "_usable", lambda device: usable)
    answers = io.StringIO()
    check_in_turn(THREE, CPU, "sim", answers)
    ended = [json.loads(line)["end"] for line in answers.getvalue().splitlines()[1::2]]
    assert [found["verdict"] for found in ended] == ["right", "wrong", "right"][: 3 if usable else 2]
