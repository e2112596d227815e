"""Starting a fresh interpreter for work that may crash, hang or fill the memory of its process."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

# Set in a child, and only there. What was started in its place, such as the program that embeds Python, starts no more.
CHILD = "MAGIHUMAN_FAST_CHILD"
# The child imports what its parent does, from wherever that comes.
PROGRAM = """\
import importlib.util, json, sys
job = json.loads(sys.argv[1])
sys.path[:] = job["path"]
spec = importlib.util.spec_from_file_location("magihuman_fast", job["package"])
sys.modules["magihuman_fast"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["magihuman_fast"])
importlib.import_module("magihuman_fast" + job["module"]).serve(job)
"""
# By place: a name would be looked up anew, perhaps from another working folder.
_PACKAGE = str(Path(__file__).resolve().parents[1] / "__init__.py")


def child_command(module: str, job: dict[str, Any]) -> list[str]:
    """The command that has `serve(job)` of a module of this package, named in full, run in a child; start it with
    `CHILD` set.

    Whoever embeds Python names its interpreter to `multiprocessing.set_executable`; else it is sys.executable. Nothing
    is imported from the working folder but what the parent would, and what a child says is there when it crashes.

    Raises:
        OSError: there is no interpreter.
    """
    interpreter = os.fsdecode(get_executable() or sys.executable or "")
    if not interpreter:
        raise OSError("the program that runs Python names no interpreter")
    if getattr(sys, "frozen", False) and interpreter == sys.executable:
        raise OSError("a frozen application is no interpreter")
    if CHILD in os.environ:
        raise OSError("this process was started to do one piece of work")
    inside = module.removeprefix(__name__.removesuffix(".guards.child_process"))
    job = job | {"module": inside, "package": _PACKAGE, "path": list(map(str, sys.path))}
    return [interpreter, "-P", "-u", "-c", PROGRAM, json.dumps(job)]


@contextmanager
def tied() -> Iterator[int]:
    """The standard input of a child that ends with the block, and with this process, by `end_with_parent`."""
    theirs, ours = os.pipe()
    try:
        yield theirs
    finally:
        os.close(theirs)
        os.close(ours)


def end_with_parent() -> None:
    """In a child: end when standard input does.

    The thread could not, were Python's lock held for ever, or the other end of the pipe by a process that the parent
    has forked.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def ending(code: int) -> str:
    """How a process ended, from its return code."""
    if code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
