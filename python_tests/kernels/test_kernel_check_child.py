"""Processes that check kernels: what they say, what they compute with, and how they end."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernel_findings import GPU
from magihuman_fast.guards import child_process
from magihuman_fast.kernels.self_check import child
from magihuman_fast.kernels.self_check.child import Finding, Limits, check_in_children

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
THREE = ("rms_norm (one expert)", "head", "renoise_step")
PATIENT = Limits(start=300, kernel=300, total=900)
# In the place of `child_process.PROGRAM`: the same, with the simulated kernels of HEAD and RENOISE broken.
BROKEN = """\
import json, os, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.self_check import child

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
child.serve(job)
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
    monkeypatch.setattr(child_process, "PROGRAM", text)


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
from magihuman_fast.kernels.self_check import child, comparison

def settings(name, device, backend):
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return child.Finding(name, "right", json.dumps([
        torch.get_float32_matmul_precision(),
        matmul.allow_tf32,
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        cudnn.allow_tf32,
        cudnn.conv.fp32_precision,
        os.environ["NVIDIA_TF32_OVERRIDE"],
    ]))

comparison.run_in_pytorch = lambda *args: None
child.check_kernel = settings
child.serve(job)
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
early = b'{"end": {"kernel": "head", "verdict": "wrong"}}'
for line in (early, b"[]", b"3", b"{}", b'{"start": 3}', b'{"end": 3}', b'{"end": {"kernel": "head"}}', b"\\xff"):
    os.write(json.loads(sys.argv[1])["answers"], line + b"\\n")
"""


def test_noise_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, NOISE + child_process.PROGRAM)
    (found,) = check_in_children(["head"], CPU, "sim", PATIENT)
    assert (found.kernel, found.verdict, found.detail) == ("head", "right", "")
    program(monkeypatch, NOISE)
    (found,) = check_in_children(["head"], CPU, "sim", PATIENT)
    assert found.verdict == "unchecked"
    assert found.detail.startswith("the process that checks them ended: exit code 0, and last said ")


def test_many_open_files(speaker: Callable[[], list[int]]) -> None:
    """In a server, say: `select` takes no descriptor from 1024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (2048 if hard == resource.RLIM_INFINITY else min(hard, 2048), hard)
    )
    with ExitStack() as files:
        files.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        while files.enter_context(open(os.devnull)).fileno() < 1024:
            pass
        assert verdicts(check_in_children(["renoise_step"], CPU, "sim", PATIENT)) == ["right"]


# A process that has kernels checked, of which one hangs once it has said so in `pipe`, which its process keeps open.
PARENT = """\
import os, sys
import torch
from magihuman_fast.guards import child_process
from magihuman_fast.kernels.self_check import child
child_process.PROGRAM = '''
import json, os, signal, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
from magihuman_fast.kernels.self_check import child, comparison

def hang(*args):
    pipe = os.open({pipe!r}, os.O_WRONLY)
    os.write(pipe, str(os.getpid()).encode())
    while True:
        signal.pause()

comparison.run_in_pytorch = lambda *args: None
child.check_kernel = hang
child.serve(job)
'''
limits = child.Limits(300, 300, 900)
child.check_in_children(["head"], torch.device("cpu"), "sim", limits)
"""


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    """Whatever ends the parent, and although the child hangs."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(pipe=str(path))], cwd=ROOT)
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert select.select([pipe], [], [], 300)[0], "no child ever hung"
        hanging = int(os.read(pipe, 16))
        parent.kill()
        try:
            assert select.select([pipe], [], [], 60)[0], "the child is still there"
            assert os.read(pipe, 16) == b""
        finally:
            with suppress(ProcessLookupError):
                os.kill(hanging, signal.SIGKILL)
    finally:
        os.close(pipe)
        parent.kill()
        parent.wait()


def test_a_hang_is_ended_and_named(speaker: Callable[[], list[int]]) -> None:
    limits = Limits(start=300, kernel=0.25, total=900)
    findings = check_in_children(THREE, CPU, "sim", limits)
    assert verdicts(findings) == ["right", "wrong", "right"]
    assert findings[1].detail == "did not end within 0.25 s"
    assert len(speaker()) == 2  # the rest in a second one, and there the same once more


def test_another_gpu_of_that_number_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is said of the one that was meant."""
    here = """
import sys, torch
torch.cuda.get_device_properties = lambda device: type("Properties", (), {"uuid": "GPU-2"})
"""
    program(monkeypatch, here + child_process.PROGRAM)
    properties = SimpleNamespace(uuid="GPU-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    findings = check_in_children(THREE, GPU, "gpu", PATIENT)
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail == (
        "the process that checks them ended: exit code 1, and last said "
        "'cuda:0 is GPU-2 here, expected GPU-1'"
    )


LATE = Finding("head", "wrong", "did not end within 20 s")


@pytest.mark.parametrize(
    ("second", "verdict", "detail"),
    [
        (Finding("head", "right"), "right", ""),
        (LATE, "wrong", LATE.detail),
        (Finding("head", "wrong", "differs"), "wrong", "differs"),
        (Finding("head", "unchecked", "cut"), "unchecked", "it did not end within 20 s, then cut"),
        (None, "unchecked", "it did not end within 20 s, then no child"),
    ],
)
def test_what_does_not_end_has_a_second_chance(
    second: Finding | None, verdict: str, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all others, because it takes the most time."""
    one, head, two = THREE
    children = [[Finding(one, "right"), LATE], [Finding(two, "right")], [second] if second else []]
    asked: list[list[str]] = []

    def one_child(job: dict[str, Any], *_: object) -> tuple[list[Finding], str]:
        asked.append(job["kernels"])
        return children.pop(0), "no child"

    monkeypatch.setattr(child, "_one_child", one_child)
    findings = check_in_children(THREE, CPU, "sim", PATIENT)
    assert asked == [[one, head, two], [two, head], [head]]
    assert verdicts(findings) == ["right", verdict, "right"]
    assert findings[1].detail == detail


@pytest.mark.parametrize(
    ("end", "verdict", "detail"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "unchecked", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "unchecked", "SIGTERM"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "wrong", "SIGSEGV"),
        ("print('std::bad_alloc'); os.abort()", "unchecked", "SIGABRT, and last said 'std::bad_alloc'"),
        ("sys.exit('no')", "wrong", "exit code 1, and last said 'no'"),
    ],
)
def test_a_kill_from_without_is_no_kernels_fault(
    end: str, verdict: str, detail: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = SPEAKER.format(pids=str(tmp_path / "pids")).replace("    signal.pause()", f"    {end}")
    program(monkeypatch, text)
    findings = check_in_children(THREE, CPU, "sim", PATIENT)
    assert verdicts(findings) == ["right", verdict, "right"]
    assert findings[1].detail == f"its process ended: {detail}"


def test_an_end_to_the_patience_with_all(speaker: Callable[[], list[int]]) -> None:
    findings = check_in_children(THREE, CPU, "sim", Limits(total=0))
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail == "no time was left of the 0 s for all of them"


def test_an_interrupt_ends_the_child(
    speaker: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = child._Lines.next

    def interrupted(self: Any, seconds: float) -> bytes | None:
        line = real(self, seconds)
        if line is not None and b"head" in line:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr(child._Lines, "next", interrupted)
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
    monkeypatch.setattr(child_process, "get_executable", lambda: str(tmp_path / "python"))
    findings = check_in_children(THREE, CPU, "sim", PATIENT)
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail.startswith("no process could be started: ")


def test_no_room_for_what_a_child_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(child.tempfile, "tempdir", str(tmp_path / "none"))
    (finding,) = check_in_children(THREE[:1], CPU, "reference", Limits())
    assert finding.verdict == "unchecked"
    assert finding.detail.startswith("no process could be started: ")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("executable", None, "the program that runs Python names no interpreter"),
        ("frozen", True, "a frozen application is no interpreter"),
    ],
)
def test_programs_that_are_no_interpreter(
    name: str, value: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as a child, they would do once more what they do."""
    monkeypatch.setattr(sys, name, value, raising=False)
    monkeypatch.setattr(child_process, "get_executable", lambda: sys.executable)
    program(monkeypatch, "raise SystemExit('started')")
    findings = check_in_children(THREE, CPU, "sim", PATIENT)
    assert verdicts(findings) == ["unchecked"] * 3
    assert findings[0].detail == f"no process could be started: {why}"


def test_a_frozen_program_may_name_an_interpreter(
    speaker: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = sys.executable
    monkeypatch.setattr(child_process, "get_executable", lambda: os.fsencode(interpreter))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "application")
    assert verdicts(check_in_children(["renoise_step"], CPU, "sim", PATIENT)) == ["right"]


def test_children_start_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An application that is started in the place of an interpreter comes to the same check."""
    said = tmp_path / "said"
    program(
        monkeypatch,
        f"""
import json, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
import torch
from magihuman_fast.guards import child_process
from magihuman_fast.kernels.self_check import child
child_process.PROGRAM = "raise SystemExit('a child of a child')"
cpu = torch.device("cpu")
(found,) = child.check_in_children(["head"], cpu, "sim", child.Limits())
open({str(said)!r}, "w").write(found.detail)
""",
    )
    check_in_children(["head"], CPU, "sim", PATIENT)
    assert said.read_text() == "no process could be started: this process was started to do one piece of work"
    assert child_process.CHILD not in os.environ


def test_the_working_folder_hides_no_module(
    speaker: Callable[[], list[int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not the one that was meant')")
    monkeypatch.chdir(tmp_path)
    assert verdicts(check_in_children(["renoise_step"], CPU, "sim", PATIENT)) == ["right"]
