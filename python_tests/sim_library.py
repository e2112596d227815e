"""Shared libraries that only tests build: the simulator with one `csrc/*/tests/sim_library.cpp`."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
TEXT = 2048  # characters that such a library may write
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi")


def build_library(kind: str, build: Path) -> ctypes.CDLL:
    """`csrc/KIND/tests/sim_library.cpp` with the simulator, compiled into the folder `build`."""
    machine = ["-march=x86-64-v3"] if os.uname().machine == "x86_64" else []
    compiler = os.environ.get("CXX", "g++")

    def run(command: Sequence[str | Path]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def compile_one(source: Path) -> Path:
        target = build / f"{source.stem}.o"
        run([compiler, *FLAGS, *machine, "-DMAGIHUMAN_SIM", f"-I{CSRC}", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        sources = [CSRC / kind / "tests" / "sim_library.cpp", *CSRC.glob("sim/*.cpp")]
        objects = list(pool.map(compile_one, sources))
    shared = build / f"lib{kind}_tests.so"
    # Its own names first: the simulator module of the package may be loaded too.
    run([compiler, "-shared", "-Wl,-Bsymbolic", *objects, "-o", shared])
    return ctypes.CDLL(str(shared))
