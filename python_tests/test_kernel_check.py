"""Kernels against PyTorch: every case on every backend, faults that must be found, and children that end badly."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from backends import BACKENDS, device_of
from magihuman_fast import attention_ops, conv_ops, kernel_check_child, matrix_ops, ops, pointwise_ops
from magihuman_fast.kernel_check import EXACT, ON_GPU, TO_BF16, TO_F32, Case, Draw, compare
from magihuman_fast.kernel_check_cases import CASES
from magihuman_fast.kernel_check_child import Finding, Limits, check_in_children, check_in_turn, check_kernel

ROOT = Path(__file__).resolve().parent.parent
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
PATIENT = Limits(start=300, kernel=300, total=900)
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
    for module in (attention_ops, conv_ops, matrix_ops, pointwise_ops):
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


def test_little_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(out: torch.Tensor, run: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plant(monkeypatch, "rms_norm", damage)
    found = check_kernel("rms_norm (one expert)", CPU, "sim")
    assert (found.verdict, found.detail) == ("unchecked", "OutOfMemoryError: CUDA out of memory")


def test_bounds() -> None:
    ref = torch.tensor([4.0, 0.0, 0.0, 0.0])  # rms 2
    for bound, at_zero in ((TO_BF16, 2.0**-4), (TO_F32, 2.0**-13)):
        assert compare(ref + at_zero, ref, bound).wrong is None
        found = compare(ref + torch.tensor([0, 0, 1.1 * at_zero, 0]), ref, bound)
        assert (found.wrong, found.allowed) == ("differs from PyTorch", at_zero)
    step = torch.tensor([3], dtype=torch.int32)
    assert compare(step, step.clone(), EXACT).wrong is None
    assert compare(step, step + 1, EXACT).wrong == "differs from PyTorch"


# --- children -------------------------------------------------------------------------------------------------

# In the place of `kernel_check_child.PROGRAM`: the same, with the simulated kernels of HEAD and RENOISE broken.
BROKEN = """\
import json, os, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
from magihuman_fast import kernel_check_child, ops

def broken(op, fault):
    real = getattr(ops, op)
    def call(*args, backend, **options):
        print("noise that is no answer")
        result = real(*args, backend=backend, **options)
        if backend == "sim":
            fault(result)
        return result
    setattr(ops, op, call)

broken("head", lambda result: os.abort())
broken("renoise_step", lambda x: x.view(-1)[5].add_(1))
kernel_check_child.serve(job)
"""
# Speaks as a child does, without kernels: all of them are right, until it comes to "head", where it waits for ever.
SPEAKER = """\
import json, os, signal, sys
open({pids!r}, "a").write(str(os.getpid()) + "\\n")
job = json.loads(sys.argv[1])
said = ""
for name in job["kernels"]:
    said += json.dumps({{"start": name}}) + "\\n"
    if name == "head":
        break
    said += json.dumps({{"end": {{"kernel": name, "verdict": "right"}}}}) + "\\n"
os.write(job["answers"], said.encode())
while said.endswith('"head"}}\\n'):
    signal.pause()
"""


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(kernel_check_child, "PROGRAM", text)


@pytest.fixture
def speaker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[int]]:
    """Children that speak like `SPEAKER`; gives the process ids of those there were, none of which is left."""
    pids = tmp_path / "pids"
    program(monkeypatch, SPEAKER.format(pids=str(pids)))

    def ended() -> list[int]:
        found = [int(line) for line in pids.read_text().split()]
        for pid in found:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        return found

    return ended


def verdicts(findings: list[Finding]) -> list[str]:
    return [finding.verdict for finding in findings]


# Tells, as a kernel's detail, how PyTorch would compute what kernels are held to.
SETTINGS = """\
import json, os, sys
import torch
{before}
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
from magihuman_fast import kernel_check, kernel_check_child

def settings(name, device, backend):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return kernel_check_child.Finding(name, "right", json.dumps([
        torch.get_float32_matmul_precision(),
        matmul.allow_tf32,
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.allow_tf32,
        cudnn.conv.fp32_precision,
        os.environ["NVIDIA_TF32_OVERRIDE"],
    ]))

kernel_check.run_in_pytorch = lambda *args: None
kernel_check_child.check_kernel = settings
kernel_check_child.serve(job)
"""


@pytest.mark.parametrize(
    "before",
    [
        "",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = 'tf32'",
    ],
)
def test_kernels_are_held_to_exact_products(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What containers set must not make the reference inexact: it would seem to be the kernel."""
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    program(monkeypatch, SETTINGS.format(before=before))
    (found,) = check_in_children(["head"], CPU, "sim", PATIENT)
    assert json.loads(found.detail) == ["highest", False, "ieee", False, False, "ieee", "0"]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"


def test_a_crash_is_contained_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, BROKEN)
    right, crashed, differs = check_in_children(THREE, CPU, "sim", PATIENT)
    assert [f.kernel for f in (right, crashed, differs)] == list(THREE)
    assert (right.verdict, right.detail) == ("right", "")
    assert right.seconds > 0
    assert crashed.verdict == "wrong"
    assert crashed.detail == "its process ended: SIGABRT, and last said 'noise that is no answer'"
    assert (differs.verdict, differs.detail) == ("wrong", "differs from PyTorch")
    assert differs.error == pytest.approx(1, rel=1e-3)


# What start-up code may print, and what no child says.
NOISE = """\
import json, os, sys
for line in ("hello", "[]", '{"start": "renoise_step"}', '{"end": {"kernel": "head", "verdict": "wrong"}}'):
    print(line, flush=True)
for line in (b"hello", b"[]", b"3", b"{}", b'{"start": 3}', b'{"end": 3}', b'{"end": {"kernel": "head"}}', b"\\xff"):
    os.write(json.loads(sys.argv[1])["answers"], line + b"\\n")
"""


def test_noise_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, NOISE + kernel_check_child.PROGRAM)
    (found,) = check_in_children(["head"], CPU, "sim", PATIENT)
    assert (found.kernel, found.verdict, found.detail) == ("head", "right", "")


# A process that has kernels checked, of which one hangs once it has said so in `pipe`, which its process keeps open.
PARENT = """\
import os, sys
import torch
from magihuman_fast import kernel_check_child
kernel_check_child.PROGRAM = '''
import json, os, signal, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
from magihuman_fast import kernel_check, kernel_check_child

def hang(*args):
    pipe = os.open({pipe!r}, os.O_WRONLY)
    os.write(pipe, str(os.getpid()).encode())
    while True:
        signal.pause()

kernel_check.run_in_pytorch = lambda *args: None
kernel_check_child.check_kernel = hang
kernel_check_child.serve(job)
'''
limits = kernel_check_child.Limits(300, 300, 900)
kernel_check_child.check_in_children(["head"], torch.device("cpu"), "sim", limits)
"""


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Whatever ends the parent, and although the child hangs."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(pipe=str(path))], cwd=ROOT)
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([pipe], [], [], 300)[0], "no child ever hung"
        child = int(os.read(pipe, 16))
        parent.kill()
        try:
            assert select.select([pipe], [], [], 60)[0], "the child is still there"
            assert os.read(pipe, 16) == b""
        finally:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
    finally:
        os.close(pipe)
        parent.kill()
        parent.wait()


def test_a_hang_is_ended_and_named(speaker: Callable[[], list[int]]) -> None:
    limits = Limits(start=300, kernel=0.25, total=900)
    findings = check_in_children(THREE, CPU, "sim", limits)
    assert verdicts(findings) == ["right", "wrong", "right"]
    assert findings[1].detail == "did not end within 0.25 s"
    assert len(speaker()) == 2  # the rest in a second one


def test_an_end_to_the_patience_with_all(speaker: Callable[[], list[int]]) -> None:
    findings = check_in_children(THREE, CPU, "sim", Limits(total=0))
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail == "no time was left of the 0 s for all of them"


def test_an_interrupt_ends_the_child(
    speaker: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = kernel_check_child._Lines.next

    def interrupted(self: Any, seconds: float) -> bytes | None:
        line = real(self, seconds)
        if line is not None and b"head" in line:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(kernel_check_child._Lines, "next", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_in_children(THREE, CPU, "sim", PATIENT)
    assert len(speaker()) == 1


@pytest.mark.parametrize(
    ("text", "limits", "detail"),
    [
        ("raise SystemExit('no such device')", PATIENT, "ended: exit code 1, and last said 'no such device'"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", PATIENT, "ended: SIGKILL"),
        ("import signal; signal.pause()", Limits(start=0.25), "was not ready within 0.25 s"),
    ],
)
def test_a_child_that_never_starts_is_no_kernels_fault(
    text: str, limits: Limits, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(monkeypatch, text)
    findings = check_in_children(THREE, CPU, "sim", limits)
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail == f"the process that checks them {detail}"


def test_no_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernel_check_child, "get_executable", lambda: str(tmp_path / "python"))
    findings = check_in_children(THREE, CPU, "sim", PATIENT)
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail.startswith("no process could be started: ")


@pytest.mark.parametrize("usable", [True, False])
def test_a_fault_that_spoils_the_device_ends_the_child(usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked after it, in the same process, would only fail with it."""
    plant(monkeypatch, "head", refuses)
    monkeypatch.setattr(kernel_check_child, "_usable", lambda device: usable)
    answers = io.StringIO()
    check_in_turn(THREE, CPU, "sim", answers)
    ended = [json.loads(line)["end"] for line in answers.getvalue().splitlines()[1::2]]
    assert [found["verdict"] for found in ended] == ["right", "wrong", "right"][: 3 if usable else 2]
