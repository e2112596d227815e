"""What nvcc makes of kernel sources: ptxas's report and the disassembly of each kernel."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from built_once import CSRC, built_once, run, with_included

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    resources: str  # what ptxas reports
    code: str  # SASS

    @property
    def instructions(self) -> list[str]:
        return [text for _, text in INSTRUCTION.findall(self.code)]

    def index_of(self, address: str) -> int:
        """Which instruction a branch to `address` ("0x1c80") goes to."""
        addresses = [int(at, 16) for at, _ in INSTRUCTION.findall(self.code)]
        return addresses.index(int(address, 16))

    def register_moves(self) -> list[tuple[str, int]]:
        """(direction, registers a thread) of each move between the roles."""
        moves = re.findall(r"USETMAXREG\.(\w+)\.CTAPOOL\s+(?:UP\d+, )?(0x[0-9a-f]+)", self.code)
        return sorted((kind, int(count, 16)) for kind, count in moves)

    def highest_register(self) -> int:
        return max(registers_of(self.code))


def registers_of(code: str) -> set[int]:
    """Registers that instructions name, and those that follow them in operands of 64 and 128 bits."""
    found = set()
    for line in code.splitlines():
        width = 4 if ".128" in line else 2 if ".64" in line or "WIDE" in line else 1
        found |= {int(n) + i for n in re.findall(r"\bR(\d+)\b", line) for i in range(width)}
    return found


@dataclass(frozen=True)
class Compiled:
    """One source, compiled and taken apart."""

    report: str
    code: str

    def of(self, name: str) -> Kernel:
        """The one kernel whose name holds `name`."""
        (resources,) = [part for part in self.report.split("Compiling entry function") if name in part]
        (sass,) = [part for part in self.code.split("Function : ")[1:] if name in part.split("\n")[0]]
        return Kernel(resources, sass)


def nvidia_program(name: str) -> str | None:
    """A program on the path, or in one of NVIDIA's packages."""
    for package in ("nvidia.cu13", "nvidia.cuda_cuobjdump"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / "bin" / name).exists():
                return str(Path(folder) / "bin" / name)
    return shutil.which(name)


def compile_kernels(sources: Sequence[Path]) -> dict[str, Compiled]:
    """Sources by their stem, two at a time; skips the test where a tool is missing."""
    tools = {"nvcc": shutil.which("nvcc"), "c++filt": shutil.which("c++filt")}
    tools |= {
        f"{name} (package nvidia-cuda-{name})": nvidia_program(name) for name in ("cuobjdump", "nvdisasm")
    }
    cutlass = importlib.util.find_spec("cutlass_library")
    for what, found in {**tools, "the CUTLASS headers (package nvidia-cutlass)": cutlass}.items():
        if found is None:
            pytest.skip(f"{what} is not installed: the kernels' machine code is not looked at")
    nvcc, demangler, cuobjdump, nvdisasm = (str(tool) for tool in tools.values())
    assert cutlass is not None
    assert cutlass.submodule_search_locations
    include = Path(cutlass.submodule_search_locations[0]) / "source" / "include"
    flags = ["-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CSRC}", f"-I{include}"]
    # ptxas says so, and no more, when it serialises products: its warnings are errors.
    strict = ["-Werror", "all-warnings", "-Xptxas=-v,--warn-on-spills,-Werror"]
    compiler = [nvcc, *flags, *strict, "-cubin"]
    versions = [run([tool, "--version"]) for tool in (nvcc, cuobjdump, nvdisasm)] + [
        version("nvidia-cutlass")
    ]

    def run_on(text: str | None, command: list[str | Path]) -> str:
        environment = os.environ | {
            "PATH": f"{Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        }
        done = subprocess.run(command, capture_output=True, text=True, input=text, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def compile_one(source: Path) -> Compiled:
        def make(target: Path) -> None:
            cubin = target.with_suffix(".cubin")
            report = run_on(None, [*compiler, source, "-o", cubin])
            code = run_on(None, [cuobjdump, "-sass", cubin])
            cubin.unlink()
            parts = {"report": run_on(report, [demangler]), "code": run_on(code, [demangler])}
            target.write_text(json.dumps(parts))

        name = str(source.relative_to(CSRC).with_suffix(".json")).replace("/", "-")
        kept = built_once(name, [*versions, *compiler, str(source), *with_included(source)], make)
        return Compiled(**json.loads(kept.read_text()))

    with ThreadPoolExecutor(2) as pool:
        stems = [source.stem for source in sources]
        return dict(zip(stems, pool.map(compile_one, sources), strict=True))
