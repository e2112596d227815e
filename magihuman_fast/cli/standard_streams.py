"""Standard output and error that may be closed, full, or read by nobody any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..errors import OutputError


class _Unfailing:
    """A text stream whose writes cannot fail: a log line or a progress bar must not end what it tells of."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a closed file is a ValueError
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def safe_streams() -> Iterator[None]:
    """Within the block writing to `sys.stderr` never fails; after it Python can end without complaint.

    Of streams that are closed, the numbers are given to the null device: the next file to be opened would get them, and
    with them what libraries write.
    """
    _fill_closed_numbers()
    with contextlib.ExitStack() as stack:
        stderr = sys.stderr if sys.stderr is not None else stack.enter_context(_null())
        try:
            with contextlib.redirect_stderr(_Unfailing(stderr)):
                yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                _settle(stream)


def _null() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def _fill_closed_numbers() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(opened, number)
                os.close(opened)


def _settle(stream: Any) -> None:
    """Let go of what cannot be written: Python would try it again when it ends, and complain."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), _null() as null:  # a ValueError: it has no number
            os.dup2(null.fileno(), stream.fileno())


def write_result(text: str) -> None:
    """Print `text` on standard output, with escapes for what its encoding lacks: a file's name may be anything.

    A reader that has gone wanted no more, which is no error.

    Raises:
        OutputError: it is closed, or full.
    """
    if sys.stdout is None:
        raise OutputError("stdout: expected an open stream for the result, found it closed")
    try:
        print(shown(text, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except (OSError, ValueError) as error:
        raise OutputError(f"stdout: the result cannot be written: {error}") from error


def shown(text: str, stream: Any) -> str:
    """`text` as `stream` can take it."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
