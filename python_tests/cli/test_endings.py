"""How a command ends: signals, and standard streams that are closed, full, or read by nobody any more."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from magihuman_fast.cli import commands, ending_signals, standard_streams
from magihuman_fast.cli import program as cli
from magihuman_fast.cli.ending_signals import Terminated, as_exceptions
from magihuman_fast.kernels.self_check import child

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "magihuman_fast"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
WORDS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "interrupted by SIGTERM",
    signal.SIGHUP: "interrupted by SIGHUP",
}
# Saving takes as long as a signal needs: the encoder writes something, and waits.
SLOW_SAVE = """\
import sys, time
from magihuman_fast.cli import program as cli
from magihuman_fast.codecs import media
def encode(out, *rest):
    open(out.name, "wb").write(b"half")
    time.sleep(60)
media._encode = encode
sys.exit(cli.main())
"""


def start(*argv: object, command: list[str] = COMMAND, **options: Any) -> subprocess.Popen[str]:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Buffered, as Python's streams are by default: what a failed write leaves is written again at the end.
    streams["env"] = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([*command, *map(str, argv)], cwd=ROOT, text=True, **streams | options)


def wait_for(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + 60
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)
    return value


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return ") Z" not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(autouse=True)
def hang_up_is_not_ignored() -> Iterator[None]:
    """As it is where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# --- signals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", CODES)
@pytest.mark.slow
def test_signal_while_saving(number: signal.Signals, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Twice at once, as a supervisor may send it: nothing half-written stays, and the old file is kept."""
    (tmp_path / "out.mp4").write_bytes(b"old")
    small = ["--size", "64x64", "--seconds", 1, "--steps", 1, "--precision", "fp32", "--device", "cpu"]
    arguments = ["--model", tiny_checkpoint, "--prompt", "Hello.", "--output", tmp_path / "out.mp4"]
    process = start("generate", *arguments, *small, "--json", command=[sys.executable, "-c", SLOW_SAVE])
    wait_for(lambda: [f for f in tmp_path.glob(".*.partial.mp4") if f.stat().st_size], process)
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number]
    assert err.endswith(f"error: {WORDS[number]}\n")
    assert json.loads(out)["error"]["exit_code"] == CODES[number]
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


@pytest.mark.slow
def test_signal_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """Also none of the files that were complete; and a folder that was there stays."""
    for folder in (tmp_path / "new" / "model", tmp_path):
        process = start("synth", folder, "--quiet")
        wait_for(lambda folder=folder: list(folder.glob(".*.partial/*/*.*")), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (143, "", "error: interrupted by SIGTERM\n")
        assert list(tmp_path.iterdir()) == []


def test_children_end_too() -> None:
    """The fresh process in which a cold start is measured."""
    process = start("bench", "--size", "tiny", "--device", "cpu", "--no-baseline")
    pids = wait_for(lambda: children(process.pid), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith("error: interrupted by SIGTERM\n")
    end = time.monotonic() + 60  # at the latest when it has imported what makes it watch its parent
    while any(map(alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_cold_start_ends_with_its_parent() -> None:
    """Whatever has ended that, and wherever the parent was: its end of the pipe closes."""
    code = "import time; from magihuman_fast.cli import benchmark; "
    code += "benchmark.Setting.load = lambda *_: time.sleep(300); benchmark.start_cold(0)"
    values = json.dumps({"presets": ["256p"], "model": None})
    silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = start(values, "256p", command=[sys.executable, "-c", code], stdin=subprocess.PIPE, **silent)
    assert process.stdin is not None
    process.stdin.close()
    try:
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()


def test_kernel_check_ends_its_child(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupted(child: subprocess.Popen[bytes], *rest: object) -> None:
        started.append(child)
        raise Terminated(signal.SIGTERM)

    monkeypatch.setattr(child, "_listen", interrupted)
    job = {"device": "cpu", "uuid": "", "backend": "sim", "kernels": [], "seconds": 60}
    with pytest.raises(Terminated):
        child._one_child(job, child.Limits(), time.monotonic() + 60)
    assert [child.returncode for child in started] == [-signal.SIGKILL]


@pytest.fixture
def ended_by(monkeypatch: pytest.MonkeyPatch, run: Any) -> Any:
    """Run `info --json` in this process, which these signals reach meanwhile; its exit code, stdout and stderr."""

    def call(*numbers: int) -> Any:
        def info(args: object) -> None:
            for number in numbers:
                os.kill(os.getpid(), number)
            time.sleep(5)

        monkeypatch.setattr(commands, "info", info)
        return run("info", "--json")

    return call


@pytest.mark.parametrize("number", CODES)
def test_called_from_a_program(number: signal.Signals, ended_by: Any) -> None:
    before = {n: signal.getsignal(n) for n in CODES}
    code, out, err = ended_by(number)
    assert (code, err) == (CODES[number], f"error: {WORDS[number]}\n")
    kind = "KeyboardInterrupt" if number == signal.SIGINT else "Terminated"
    assert json.loads(out)["error"] == {"kind": kind, "message": WORDS[number], "exit_code": code}
    assert {n: signal.getsignal(n) for n in CODES} == before


def test_signal_that_a_library_takes_for_something_else(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(args: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise ImportError("no such library") from error

    monkeypatch.setattr(commands, "info", info)
    assert run("info") == (143, "", "error: interrupted by SIGTERM\n")


def test_signal_that_a_library_drops(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(args: object) -> commands.Answer:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        return commands.Answer({}, "as if nothing had been")

    monkeypatch.setattr(commands, "info", info)
    assert run("info") == (143, "", "error: interrupted by SIGTERM\n")


def test_imports_are_finished_first() -> None:
    """What is raised within some of them is dropped."""
    done = []

    def imports(ending: ending_signals.Ending) -> None:
        with ending.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("imported")

    with as_exceptions() as ending, pytest.raises(Terminated):
        imports(ending)
    assert done == ["imported"]


def test_signal_while_libraries_are_imported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "a.mp4")
    program = f"""
import importlib.abc, os, signal, sys
class Signal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numpy._core.overrides":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Signal())
from magihuman_fast.cli import program as cli
sys.exit(cli.main(["generate", "--model", {str(tiny_checkpoint)!r}, "--prompt", "a", "--output", {output!r}]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (143, "error: interrupted by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_a_program_has_set_stays(handlers: None) -> None:
    got = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    with as_exceptions():
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert got == [signal.SIGTERM]


def test_a_second_signal_waits_for_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []
    with as_exceptions():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("nothing was raised")
        except Terminated:
            for number in CODES:
                os.kill(os.getpid(), number)
            cleaned.append("all")
        monkeypatch.setattr(ending_signals, "PATIENCE", 0.0)  # who does not end is asked again
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert cleaned == ["all"]


def test_other_threads_change_nothing(run: Any) -> None:
    before = {n: signal.getsignal(n) for n in CODES}
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["info", "--simulator", "--json"])))
    thread.start()
    thread.join()
    assert codes == [2]
    assert {n: signal.getsignal(n) for n in CODES} == before


def test_system_without_sighup(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import signal; del signal.SIGHUP; from magihuman_fast.cli import main; "
    code += "raise SystemExit(main(['--version']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- streams --------------------------------------------------------------------------------------------------


@pytest.fixture
def unread() -> Iterator[IO[bytes]]:
    """A pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "wb", buffering=0) as stream:
        yield stream


def ended(*argv: object, **streams: Any) -> tuple[int, str | None, str | None]:
    process = start(*argv, **streams)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("argv", [["--help"], ["info"], ["info", "--json"]])
def test_reader_of_stdout_has_gone(argv: list[str], unread: IO[bytes]) -> None:
    assert ended(*argv, stdout=unread) == (0, None, "")


def test_exit_code_of_a_failure_nobody_reads(unread: IO[bytes]) -> None:
    assert ended("generate", "--json", stdout=unread, stderr=unread) == (2, None, None)


@pytest.mark.parametrize("argv", [["--help"], ["info", "--json"]])
def test_stdout_is_full(argv: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        code, _, err = ended(*argv, stdout=full)
    assert code == 4
    assert err == "error: stdout: the result cannot be written: [Errno 28] No space left on device\n"


def with_shell(redirections: str) -> list[str]:
    return ["sh", "-c", f'exec "$0" "$@" {redirections}', *COMMAND]


@pytest.mark.slow
def test_stdout_is_closed(tiny_checkpoint: Path) -> None:
    """No result on stderr; what a run would print is refused before it runs."""
    expected = "error: stdout: expected an open stream for the result, found it closed"
    assert ended("--help", command=with_shell(">&-")) == (4, "", f"{expected}\n")
    for argv in (["info"], ["info", "--json"]):
        assert ended(*argv, command=with_shell(">&-")) == (4, "", f"{expected}; --quiet needs none\n")
    assert ended("check", tiny_checkpoint, "--quiet", command=with_shell(">&-"))[::2] == (4, f"{expected}\n")


def test_stderr_is_closed() -> None:
    """No error on stdout, but for what --json asks for."""
    assert ended("generate", command=with_shell("2>&-")) == (2, "", "")
    code, out, err = ended("generate", "--json", command=with_shell("2>&-"))
    assert (code, err) == (2, "")
    assert json.loads(str(out))["error"]["exit_code"] == 2
    assert ended("generate", "--json", command=with_shell(">&- 2>&- <&-")) == (2, "", "")


@pytest.mark.parametrize("how", ["unread", "closed", "full"])
@pytest.mark.slow
def test_what_cannot_be_logged_ends_nothing(
    how: str, unread: IO[bytes], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.mp4"
    argv = ["generate", "--model", tiny_checkpoint, "--prompt", "Hello.", "--output", output, "--verbose"]
    argv += ["--size", "70x64", "--seconds", 1, "--steps", 1, "--precision", "fp32", "--device", "cpu"]
    if how == "unread":
        code, out, _ = ended(*argv, stderr=unread)
    else:
        code, out, _ = ended(*argv, command=with_shell("2>&-" if how == "closed" else "2>/dev/full"))
    assert code == 0
    assert str(out).startswith(f"wrote {output}: 25 frames")
    assert output.stat().st_size > 1000


def test_files_do_not_get_the_numbers_of_closed_streams() -> None:
    """Else whatever a library prints would be written into the video."""
    code = "import os; from magihuman_fast.cli.standard_streams import safe_streams\n"
    code += "with safe_streams(): raise SystemExit(os.open(os.devnull, os.O_WRONLY))"
    for closed in (">&-", "2>&-", "<&- >&- 2>&-", ""):
        command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", code]
        assert ended(command=command)[0] > 2


def test_progress_without_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with standard_streams.safe_streams():
        progress = commands.Progress(hidden=False)
        progress("denoise", 1, 2)
        progress.close()
    assert sys.stderr is None


def test_output_name_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    standard_streams.write_result("wrote vidéo.mp4")
    assert stream.buffer.getvalue() == b"wrote vid\\xe9o.mp4\n"  # type: ignore[attr-defined]
