"""The shell command `magihuman-fast`: generate, check, synth, bench and info.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 bad request, 3 bad checkpoint,
4 cannot write (a file, or the result to stdout), 129, 130 and 143 ended by SIGHUP, Ctrl-C and SIGTERM. A reader of
stdout that has gone changes none of them, nor does a stderr that takes no more. What the commands do is in `commands`,
imported when one is run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import Cancelled, CheckpointError, InputError, OutputError
from .ending_signals import Ending, Terminated, as_exceptions
from .parser import PROGRAM, build_parser
from .standard_streams import safe_streams, shown, write_result

if TYPE_CHECKING:
    from .commands import Answer

EXIT_CODES: tuple[tuple[type[BaseException], int], ...] = (
    (InputError, 2),
    (CheckpointError, 3),
    (OutputError, 4),
    (Cancelled, 130),
    (KeyboardInterrupt, 130),
)


class _LogLines(logging.Handler):
    """Log records as lines on stderr that leave progress bars whole."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. `argv` are the arguments after the program's name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json, verbose = "--json" in arguments, "--verbose" in arguments
    with safe_streams(), as_exceptions() as ending:
        try:
            return _run(arguments, ending)
        except (Exception, KeyboardInterrupt) as error:
            # CPython remembers an interruption that has left an exec(), as of a module being imported, until the next
            # one, and would end by SIGINT whatever is returned here.
            exec("")
            return _fail(ending.raised or error, as_json, verbose)


def _run(arguments: list[str], ending: Ending) -> int:
    told = io.StringIO()
    try:
        # Left to itself argparse prints help on stderr where there is no stdout.
        with contextlib.redirect_stdout(told):
            args = build_parser().parse_args(arguments)
    except SystemExit as stop:  # --help, --version
        write_result(told.getvalue().rstrip("\n"))
        return int(stop.code or 0)
    if sys.stdout is None and (args.json or not args.quiet):
        raise OutputError(
            "stdout: expected an open stream for the result, found it closed; --quiet needs none"
        )
    # Libraries that print must not spoil the result.
    with _logging(args), contextlib.redirect_stdout(sys.stderr):
        with ending.held():
            commands = import_module(".commands", __package__)
        answer: Answer = getattr(commands, args.command)(args)
    ending.again()
    text = json.dumps(answer.values) if args.json else answer.text
    if text:
        write_result(text)
    return answer.code


def _fail(error: BaseException, as_json: bool, verbose: bool) -> int:
    code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)
    if isinstance(error, Terminated):
        code = 128 + error.number
    kind, message = type(error).__name__, " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        message = message or "interrupted"
    elif _is_out_of_memory(error):
        message = f"out of memory: {message or kind}; '{PROGRAM} check' tells what is needed"
    elif code == 1:
        message = f"unexpected {kind}: {message} (--verbose shows where)"
    if verbose:
        traceback.print_exception(error)
    print(shown(f"error: {message}", sys.stderr), file=sys.stderr)
    if as_json:
        # Where it cannot be printed either, the exit code and the line above have said it.
        with contextlib.suppress(OutputError):
            write_result(json.dumps({"error": {"kind": kind, "message": message, "exit_code": code}}))
    return code


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: importing torch only to ask would make every usage error slow.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


@contextlib.contextmanager
def _logging(args: argparse.Namespace) -> Iterator[None]:
    """Show the package's log on stderr while a command runs."""
    logger = logging.getLogger(__name__.removesuffix(".cli.program"))
    handler, level = _LogLines(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if args.verbose else logging.ERROR if args.quiet else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
