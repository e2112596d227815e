"""Checks kernels in a child process, because one that faults takes its process's CUDA context with it, and one that
hangs never gives it back.

The child is a fresh interpreter in a session of its own. It says, on a pipe that nothing else writes to, which kernel
it starts and how that one ended; whatever ends the child, or keeps it from answering, is the doing of the kernel that
it started last. The others are then checked in another child. It reads from a pipe that nobody writes to, and ends when
that ends: with its parent. `check_in_children` is the parent's side, `serve` the child's.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import IO, Any, Literal, TextIO

import torch

from ...guards.child_process import CHILD, child_command, end_with_parent, ending, tied
from .. import ops
from . import comparison
from .cases import CASES

log = logging.getLogger(__name__)

Verdict = Literal["right", "wrong", "unchecked"]

TOO_LONG = "did not end within"


@dataclass(frozen=True)
class Limits:
    """Seconds: until a child can take its first kernel, until a kernel has answered, and for all children together."""

    start: float = 40
    kernel: float = 20
    total: float = 60


@dataclass(frozen=True)
class Finding:
    """What came out for one kernel: a name of `cases.CASES`.

    `unchecked` is neither right nor wrong: the kernel never ran, or what ended it may be no doing of its own. `detail`
    says what was wrong, or why. `error` is the distance from PyTorch of the element furthest from it and `allowed` what
    that may be; None where nothing could be compared.
    """

    kernel: str
    verdict: Verdict
    detail: str = ""
    error: float | None = None
    allowed: float | None = None
    seconds: float = 0.0

    @property
    def timed_out(self) -> bool:
        """Twice, and that is wrong; but work of others on the GPU may have been why."""
        return self.verdict == "wrong" and self.detail.startswith(TOO_LONG)


# Signals by which a process is ended from without: by whoever runs the machine, or by the system when memory is short.
KILLS = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
# What is said, by whichever library, where memory is short.
NO_MEMORY = re.compile(
    r"out of memory|ALLOC_FAILED|can(no|')t allocate memory|MemoryAllocation|bad_alloc|MemoryError",
    re.IGNORECASE,
)
# Of the child: above all of torch's settings, NVIDIA's libraries obey the first one.
ENVIRONMENT = {"NVIDIA_TF32_OVERRIDE": "0", CHILD: "1"}


def gpu_uuid(device: torch.device) -> str:
    """Which GPU a device is; "" for none, and where torch does not tell."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) if device.type == "cuda" else ""


def check_in_children(
    kernels: Sequence[str], device: torch.device, backend: ops.Backend, limits: Limits
) -> list[Finding]:
    """One finding for each of `kernels`, in their order, whatever they do.

    One that does not end has a second chance, in another child and after all others.
    """
    end = time.monotonic() + limits.total
    found: dict[str, Finding] = {}
    late: dict[str, Finding] = {}
    while waiting := [name for name in kernels if name not in found]:
        why = f"no time was left of the {limits.total:g} s for all of them"
        if time.monotonic() < end:
            waiting.sort(key=late.__contains__)
            job = {
                "device": str(device),
                "uuid": gpu_uuid(device),
                "backend": backend,
                "kernels": waiting,
                "seconds": 2 * limits.total,
            }
            try:
                findings, why = _one_child(job, limits, end)
            except OSError as error:
                findings, why = [], f"no process could be started: {error}"
            chances = {finding.kernel: finding for finding in findings if finding.timed_out}
            found |= {f.kernel: f for f in findings if f.kernel in late or f.kernel not in chances}
            late |= chances
            if findings:
                continue
        found |= {name: Finding(name, "unchecked", why) for name in waiting}
    for name, first in late.items():
        if found[name].verdict == "unchecked":
            found[name] = replace(found[name], detail=f"it {first.detail}, then {found[name].detail}")
    return [found[name] for name in kernels]


def _one_child(job: dict[str, Any], limits: Limits, end: float) -> tuple[list[Finding], str]:
    """The findings of one child; where there are none, why it never got to a kernel.

    Raises:
        OSError: no process, or nothing to hear it by.
    """
    with tempfile.TemporaryFile() as said, tied() as stdin:
        answers, others_end = os.pipe()
        with open(answers, "rb", buffering=0):
            try:
                child = subprocess.Popen(
                    child_command(__name__, job | {"answers": others_end}),
                    stdin=stdin,
                    stdout=said,
                    stderr=said,
                    env=os.environ | ENVIRONMENT,
                    pass_fds=[others_end],
                    start_new_session=True,
                )
            finally:
                os.close(others_end)
            try:
                return _listen(child, answers, said, limits, end)
            finally:
                _kill(child)


def _listen(
    child: subprocess.Popen[bytes], answers: int, said: IO[bytes], limits: Limits, end: float
) -> tuple[list[Finding], str]:
    findings: list[Finding] = []
    running: str | None = None
    limit, started = limits.start, time.monotonic()
    lines = _Lines(answers)
    while True:
        left = end - time.monotonic()
        line = lines.next(min(limit, left))
        if line is None:  # no answer
            if running is None:
                return findings, f"the process that checks them was not ready within {min(limit, left):.3g} s"
            verdict: Verdict = "wrong" if limit <= left else "unchecked"
            detail = f"{TOO_LONG} {limit:g} s" if verdict == "wrong" else "no time was left for it"
            findings.append(Finding(running, verdict, detail, seconds=time.monotonic() - started))
            return findings, ""
        if not line:  # the child has ended
            how = _how(child, said)
            if running is not None:
                verdict = "unchecked" if _from_without(child, said) else "wrong"
                seconds = time.monotonic() - started
                findings.append(Finding(running, verdict, f"its process ended: {how}", seconds=seconds))
            return findings, f"the process that checks them ended: {how}"
        message = _message(line)
        if isinstance(message, Finding):
            if message.kernel == running:
                findings.append(message)
                running = None
        elif message is not None:
            running, limit, started = message, limits.kernel, time.monotonic()


def _message(line: bytes) -> Finding | str | None:
    """What a child says: which kernel starts, or how one ended. None: something else, which is nobody's answer."""
    try:
        match json.loads(line):
            case {"start": str(name)}:
                return name
            case {"end": dict(values)}:
                return Finding(**values)
    except (ValueError, TypeError):
        pass
    return None


class _Lines:
    """The lines that a child writes into a pipe."""

    def __init__(self, pipe: int) -> None:
        self._pipe, self._buffer = pipe, b""
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLIN)

    def next(self, seconds: float) -> bytes | None:
        """The next line; None if it does not come in time, nothing if there is none."""
        end = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = max(end - time.monotonic(), 0)
            if not self._poll.poll(1000 * left):
                return None
            read = os.read(self._pipe, 1 << 16)
            if not read:
                return b""  # half a line is none
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


def _how(child: subprocess.Popen[bytes], said: IO[bytes]) -> str:
    """How a process ended that closed its answers, and the last that it said."""
    with suppress(subprocess.TimeoutExpired):
        child.wait(5)
    code = child.returncode
    how = "it answers no more" if code is None else ending(code)
    lines = _lines(said)
    return f"{how}, and last said {lines[-1].strip()[:300]!r}" if lines else how


def _from_without(child: subprocess.Popen[bytes], said: IO[bytes]) -> bool:
    """Whether a process that has ended did so because it was killed, or found no memory."""
    killed = child.returncode is not None and -child.returncode in KILLS
    return killed or any(map(NO_MEMORY.search, _lines(said)[-20:]))


def _lines(said: IO[bytes]) -> list[str]:
    said.seek(0)
    return said.read().decode("utf-8", "replace").strip().splitlines()


def _kill(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            log.warning("process %d, which checked a kernel, does not end although killed", child.pid)


# --- in the child ---------------------------------------------------------------------------------------------


def serve(job: dict[str, Any]) -> None:
    """Check the kernels of a job one after another, telling of each as it starts and as it ends."""
    end_with_parent()  # should the parent be killed while a kernel hangs, nobody else would end this process
    faulthandler.dump_traceback_later(job["seconds"], exit=True)
    os.set_inheritable(job["answers"], False)
    _compute_exactly()
    device = torch.device(job["device"])
    uuid = gpu_uuid(device)
    if uuid != job["uuid"]:  # the parent has begun to use GPUs under another CUDA_VISIBLE_DEVICES
        sys.exit(f"{device} is {uuid} here, expected {job['uuid']}")
    with open(job["answers"], "w", encoding="utf-8", buffering=1) as answers:
        check_in_turn(job["kernels"], device, job["backend"], answers)


def _compute_exactly() -> None:
    """Have PyTorch compute in the precision of its tensors, whatever the environment and start-up code have set.

    Torch refuses to compute where its older settings and its newer ones (`fp32_precision`) contradict one another, so
    both are set. The older setting of matrix products sets the newer one too; that of convolutions leaves it as it is.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def check_in_turn(
    kernels: Sequence[str], device: torch.device, backend: ops.Backend, answers: TextIO
) -> None:
    """Check kernels until none is left, or the device has become useless to this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # A device that cannot be used, and what PyTorch takes to load its libraries, are no kernel's fault.
    for case in {CASES[name].operation: CASES[name] for name in kernels}.values():
        comparison.run_in_pytorch(case, device, backend)
    for name in kernels:
        print(json.dumps({"start": name}), file=answers)
        finding = check_kernel(name, device, backend)
        print(json.dumps({"end": asdict(finding)}), file=answers)
        if finding.error is None and finding.verdict == "wrong" and not _usable(device):
            break  # a new process goes on


def check_kernel(name: str, device: torch.device, backend: ops.Backend) -> Finding:
    """Check one kernel in this process. Exceptions are findings; faults and hangs are the caller's to live with."""
    start = time.perf_counter()
    try:
        found = comparison.run_case(CASES[name], device, backend)
    except Exception as error:
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or NO_MEMORY.search(str(error))
        if short:
            return Finding(name, "unchecked", _first_line(error))
        return Finding(name, "wrong", _first_line(error), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    verdict: Verdict = "right" if found.wrong is None else "wrong"
    return Finding(name, verdict, found.wrong or "", found.error, found.allowed, seconds)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _usable(device: torch.device) -> bool:
    """Whether the device still works: a fault ends all work of its process."""
    try:
        return bool((torch.ones(8, device=device) + 1).sum().item() == 16)
    except Exception:
        return False
