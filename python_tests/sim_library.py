"""Shared libraries that only tests build: the simulator with one `csrc/*/tests/sim_library.cpp`."""

from __future__ import annotations

import ctypes

from built_once import CSRC, linked

TEXT = 2048  # characters that such a library may write


def build_library(kind: str) -> ctypes.CDLL:
    """`csrc/KIND/tests/sim_library.cpp` with the simulator."""
    source = CSRC / kind / "tests" / "sim_library.cpp"
    # Its own names first: the simulator module of the package may be loaded too.
    return ctypes.CDLL(str(linked(f"lib{kind}_tests.so", [source], "-shared", "-Wl,-Bsymbolic")))
