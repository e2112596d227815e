"""Signals that end a command as Ctrl-C does: by an exception, so that everything half-done is undone on the way out."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# A supervisor may repeat itself or send several signals; what comes this soon after the first is the same wish, and
# must not break the clean-up. Later ones end what does not get on with it.
PATIENCE = 5.0  # seconds
# What each does to a process that has not said otherwise. Windows has no SIGHUP.
_DEFAULTS = {
    getattr(signal, name): default
    for name, default in (
        ("SIGINT", signal.default_int_handler),
        ("SIGTERM", signal.SIG_DFL),
        ("SIGHUP", signal.SIG_DFL),
    )
    if hasattr(signal, name)
}


class Terminated(KeyboardInterrupt):
    """A signal has asked the process to end. No `Exception`, so that nobody takes it for a failure of their own."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


@dataclass
class Ending:
    """What the last signal has raised, if there was one: some libraries raise another error for it while imported."""

    raised: KeyboardInterrupt | None = None
    _held: bool = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block signals wait for its end. For imports: torch's C code drops what is raised in some."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.again()

    def again(self) -> None:
        """Raise what a signal has raised, if it is not on its way already."""
        if self.raised is not None:
            raise self.raised


@contextmanager
def as_exceptions() -> Iterator[Ending]:
    """Within the block SIGINT, SIGTERM and SIGHUP raise `KeyboardInterrupt` or `Terminated` in the main thread.

    Only those with their default effect: one that is ignored, as SIGHUP under nohup, or handled by the program around,
    stays so. In other threads than the main one nothing changes: Python does not let them.
    """
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return
    first: float | None = None

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if first is not None and now - first < PATIENCE:
            return
        first = now
        ending.raised = KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)
        if not ending._held:
            raise ending.raised

    taken = {}
    try:
        for number, default in _DEFAULTS.items():
            if signal.getsignal(number) is default:
                taken[number] = default
                signal.signal(number, end)
        yield ending
    finally:
        for number, default in taken.items():
            signal.signal(number, default)
