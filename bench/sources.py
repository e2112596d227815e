"""Which files each kernel is made of, and whether they are still what a measurement was made with.

A measurement carries the digest of every file under csrc: changes are found in a dirty tree and outside git too.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

# Every operation's parameters are declared in api.h: a new one there changes no other kernel.
INTERFACE = "csrc/api.h"
NOT_KERNELS = ("csrc/sim/", "csrc/binding.cpp")
SUFFIXES = {".cu", ".cuh", ".h"}
LAUNCHER = re.compile(r"^void launch_(\w+)\(const \w+& \w+, Stream \w+\) \{", re.MULTILINE)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def device_files(root: Path) -> list[str]:
    """Files under csrc that kernels can be made of, relative to `root`."""
    found = (path for path in (root / "csrc").rglob("*") if path.suffix in SUFFIXES)
    names = sorted(path.relative_to(root).as_posix() for path in found)
    return [n for n in names if n != INTERFACE and not n.startswith(NOT_KERNELS) and "/tests/" not in n]


def digests(root: Path) -> dict[str, str]:
    """A short SHA-256 of every such file."""
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest()[:16] for name in device_files(root)}


def kernel_sources(root: Path) -> dict[str, list[str]]:
    """Operation to the files that its launcher's file includes, itself among them, found by their `#include` lines."""
    known = set(device_files(root))
    texts = {name: (root / name).read_text(encoding="utf-8") for name in known}

    def included(name: str) -> set[str]:
        folder = name.rsplit("/", 1)[0]
        wanted = (
            option for line in INCLUDE.findall(texts[name]) for option in (f"csrc/{line}", f"{folder}/{line}")
        )
        return known.intersection(wanted)

    found = {}
    for name in sorted(known):
        for op in LAUNCHER.findall(texts[name]):
            closure, frontier = {name}, {name}
            while frontier:
                frontier = {other for file in frontier for other in included(file)} - closure
                closure |= frontier
            found[op] = sorted(closure)
    return dict(sorted(found.items()))


def changed_files(files: list[str], then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Those of `files` whose digest differs from what it was, or that had none."""
    return [name for name in files if then.get(name) != now.get(name)]
