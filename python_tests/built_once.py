"""What tests compile from csrc: made once, by the first process that wants it, and kept in build/tests for later runs,
under a digest of everything that it is made of."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sources

CSRC = Path(__file__).resolve().parent.parent / "csrc"
KEPT = CSRC.parent / "build" / "tests"
DAY = 24 * 3600
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    *("-std=c++20", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"),
    *("-DMAGIHUMAN_SIM", f"-I{CSRC}"),
    *(("-march=x86-64-v3",) if os.uname().machine == "x86_64" else ()),
)


def run(command: Sequence[str | Path]) -> str:
    """The standard output of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def with_included(source: Path) -> list[Path]:
    """A source and every file of csrc that it includes, and those that they do."""
    return sources.with_included(source, set(CSRC.rglob("*")))


def built_once(name: str, made_of: Sequence[str | Path], make: Callable[[Path], None]) -> Path:
    """The file that `make` writes where it is told to; everything that decides about it is in `made_of`: the contents
    of paths, and words."""
    digest = hashlib.sha256()
    for part in made_of:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        digest.update(f"{part if isinstance(part, Path) else ''} {len(data)}\n".encode())
        digest.update(data)
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{digest.hexdigest()[:32]}{Path(name).suffix}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            aside = folder / f"aside{kept.suffix}"
            aside.unlink(missing_ok=True)
            make(aside)
            aside.rename(kept)
        os.utime(kept)
        for other in folder.iterdir():
            if other.name != "lock" and time.time() - other.stat().st_mtime > DAY:
                other.unlink()
    return kept


def compile_to(name: str, command: Sequence[str | Path], made_of: Sequence[Path]) -> Path:
    """What the command writes to the path that is put behind it."""
    version = run([str(command[0]), "--version"])

    def make(target: Path) -> None:
        run([*command, "-o", target])

    return built_once(name, [version, *map(str, command), *made_of], make)


def compiled(source: Path) -> Path:
    """The object file of a C++ source, compiled for the simulator."""
    name = str(source.relative_to(CSRC).with_suffix(".o")).replace("/", "-")
    return compile_to(name, [COMPILER, *FLAGS, "-c", source], with_included(source))


def linked(name: str, files: Sequence[Path], *flags: str) -> Path:
    """A program or a library of such C++ files and the simulator."""
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*files, *sorted(CSRC.glob("sim/*.cpp"))]))
    return compile_to(name, [COMPILER, *flags, *objects], objects)
