"""Forked children with limits of their own, for work that may hang, crash or leave the device broken.

The parent imports everything once and never touches CUDA, so that each child begins with a fresh context and in
milliseconds. Nor does it ever compute on more than one thread: a pool of threads does not survive a fork, and the child
would wait for it for ever. A child is a process group of its own; it is killed as a group when it has had its seconds,
or when it has said nothing for too long.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

PR_SET_PDEATHSIG = 1  # linux/prctl.h
POLL_SECONDS = 0.02
# A process that is stuck in the driver may take a while to die; whatever it does, the run goes on.
BURIAL_SECONDS = 10.0
STICKY = 77  # a child's exit code where the device answers no more in its context


@dataclass(frozen=True)
class Ended:
    """How a child ended: "ok", "exit code N", "signal N", "hung" (silent for too long) or "out of time"."""

    how: str
    seconds: float


# How torch asks the driver for its devices, which is what everything else begins with; a torch without CUDA has no such
# function, and takes one for a sign of CUDA.
_COUNT = "_cuda_getDeviceCount"
_of_torch = getattr(torch._C, _COUNT, None)


def forbid_cuda() -> None:
    """From now on, asking for CUDA devices in this process is an error: a context here would break every child."""

    def refuse() -> int:
        raise RuntimeError("the parent of forked children must not touch CUDA")

    setattr(torch._C, _COUNT, refuse)


def allow_cuda() -> None:
    """In a child, or when no more children will be forked."""
    if _of_torch is None:
        vars(torch._C).pop(_COUNT, None)
    else:
        setattr(torch._C, _COUNT, _of_torch)


def run_forked(
    work: Callable[[], object],
    *,
    log: Path,
    seconds: float,
    stall: float,
    heartbeat: Path,
    environment: Mapping[str, str] | None = None,
    before_kill: Callable[[int], object] = lambda pid: None,
    threads: int = 1,
) -> Ended:
    """Run `work` in a child, its output appended to `log`.

    `stall`: seconds without growth of the file `heartbeat` after which the child counts as hung. `before_kill` is
    called with the pid of a child that hangs, before it is killed. `threads`: that torch computes on in the child.
    """
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_child(work, log, environment or {}, threads)
    try:
        how = _watch(pid, began + seconds, stall, heartbeat)
        if how == "hung":
            with contextlib.suppress(Exception):  # evidence is welcome, and no condition
                before_kill(pid)
    finally:
        bury(pid)
    return Ended(how, time.monotonic() - began)


def _be_child(work: Callable[[], object], log: Path, environment: Mapping[str, str], threads: int) -> None:
    """Never returns."""
    code = 1
    try:
        os.setsid()
        # Ends with its parent, however that ends: it may hold a GPU.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.update(environment)
        faulthandler.enable()
        allow_cuda()
        torch.set_num_threads(threads)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            # No clean-up: exit handlers belong to the parent, and a broken context would make them fail.
            os._exit(code)


def _watch(pid: int, deadline: float, stall: float, heartbeat: Path) -> str:
    size, heard = _size(heartbeat), time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
            code = os.WEXITSTATUS(status)
            return "ok" if code == 0 else f"exit code {code}"
        now = time.monotonic()
        if now >= deadline:
            return "out of time"
        grown = _size(heartbeat)
        if grown != size:
            size, heard = grown, now
        elif now - heard > stall:
            return "hung"
        time.sleep(POLL_SECONDS)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def bury(pid: int) -> None:
    """Kill a child's group, whatever is left of it, and wait a while for the child."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    deadline = time.monotonic() + BURIAL_SECONDS
    while time.monotonic() < deadline:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return
        except ChildProcessError:
            return
        time.sleep(POLL_SECONDS)
