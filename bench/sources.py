"""Which files each kernel is made of, and whether they are still what a measurement was made with.

A measurement carries the digest of every file under csrc: changes are found in a dirty tree and outside git too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container
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


def with_included(source: Path, among: Container[Path]) -> list[Path]:
    """A source and every file of csrc that it includes, and those that they do, as far as they are `among` these."""
    csrc = next(folder for folder in source.parents if folder.name == "csrc")
    found, frontier = {source}, [source]
    while frontier:
        path = frontier.pop()
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            new = {csrc / name, path.parent / name} - found
            frontier += [option for option in new if option in among]
            found.update(frontier)
    return sorted(found)


def kernel_sources(root: Path) -> dict[str, list[str]]:
    """Operation to the files that its launcher's file includes, itself among them, found by their `#include` lines."""
    known = device_files(root)
    among = {root / name for name in known}
    found = {}
    for name in known:
        for op in LAUNCHER.findall((root / name).read_text(encoding="utf-8")):
            found[op] = [path.relative_to(root).as_posix() for path in with_included(root / name, among)]
    return dict(sorted(found.items()))


def changed_files(files: list[str], then: dict[str, str], now: dict[str, str]) -> list[str]:
    """Those of `files` whose digest differs from what it was, or that had none."""
    return [name for name in files if then.get(name) != now.get(name)]
