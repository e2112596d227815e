"""What a hanging kernel is waiting for: a GPU core dump taken through the driver's pipe, read by cuda-gdb.

The driver opens the pipe when a context is made, if the environment asks for it; whatever is written into it makes it
dump all warps. Lines are there because kernels are compiled with -lineinfo.
"""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

from gpu_kit import cuda_tool

DUMP_SECONDS, READ_SECONDS = 8.0, 20.0
MAX_TEXT = 400_000  # characters of what cuda-gdb says that are kept
COMMANDS = (
    "set pagination off",
    "info cuda devices",
    "info cuda kernels",
    "info cuda threads",
    "info cuda warps",
    "info registers $pc",
    "x/4i $pc",
    "info cuda barriers",
)


def environment(folder: Path) -> dict[str, str]:
    """For a child whose GPU core may be asked for, or that faults."""
    return {
        "CUDA_ENABLE_USER_TRIGGERED_COREDUMP": "1",
        "CUDA_ENABLE_COREDUMP_ON_EXCEPTION": "1",
        "CUDA_COREDUMP_PIPE": str(folder / "pipe"),
        "CUDA_COREDUMP_FILE": str(folder / "core"),
        "CUDA_COREDUMP_SHOW_PROGRESS": "1",
        # Shared memory is kept: barriers lie there.
        "CUDA_COREDUMP_GENERATION_FLAGS": "skip_nonrelocated_elf_images,skip_global_memory,skip_local_memory",
    }


def trigger(folder: Path) -> str | None:
    """Ask the child's driver for a dump; why there is none, or None."""
    pipe, core = folder / "pipe", folder / "core"
    try:
        # Without waiting: where nobody reads, opening fails at once.
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        return f"no pipe: {errno.errorcode.get(error.errno or 0, error)}"
    try:
        os.write(descriptor, b"1")
    except OSError as error:
        return f"the pipe could not be written: {error}"
    finally:
        os.close(descriptor)
    deadline, size = time.monotonic() + DUMP_SECONDS, -1
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = core.stat().st_size if core.exists() else -1
        if now > 0 and now == size:
            return None
        size = now
    return None if size > 0 else f"no core within {DUMP_SECONDS:.0f} s"


def start_reading(folder: Path) -> subprocess.Popen[bytes] | str:
    """Have cuda-gdb tell of the core, beside whatever comes next, into `folder`/said; in words why it cannot."""
    program = cuda_tool("cuda-gdb")
    if program is None:
        return "cuda-gdb is not installed"
    words = [
        program,
        "-batch",
        "-nx",
        "-ex",
        "set pagination off",
        "-ex",
        f"target cudacore {folder / 'core'}",
    ]
    for command in COMMANDS:
        words += ["-ex", f"echo \\n(cuda-gdb) {command}\\n", "-ex", command]
    with (folder / "said").open("wb") as file:
        return subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def finish_reading(
    reader: subprocess.Popen[bytes], folder: Path, text: Path, title: str, seconds: float = READ_SECONDS
) -> str:
    """Append what was told to `text`, waiting for so long; in words what came of it."""
    try:
        reader.wait(timeout=seconds)
        how = f"cuda-gdb: exit code {reader.returncode}"
    except subprocess.TimeoutExpired:
        reader.kill()
        how = "cuda-gdb took too long"
    said = (folder / "said").read_text(encoding="utf-8", errors="replace")[:MAX_TEXT]
    with text.open("a", encoding="utf-8") as file:
        file.write(f"===== {title}\n{said}\n")
    return f"{how}, {len(said)} characters in {text.name}"
