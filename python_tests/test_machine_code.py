"""What nvcc makes of the matrix kernels: no spills, no local memory, tensor-core and copy-engine instructions, and the
registers of each role as planned."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from test_simulator import CSRC, nvidia_program

# Threads share 65536 registers: 384 of them start with 168 each; then one warpgroup keeps 40 and two take 232.
REGISTERS_AT_START, PRODUCER, CONSUMER = 168, 40, 232

# Source, and what its two kernels multiply: products of 64 rows by the tile's columns, or by 64 for the gates.
WIDE, SQUARE = "TileConfig<magihuman::bf16, 256, 2, 4>", "TileConfig<magihuman::bf16, 128, 1, 6>"
PRODUCTS = {
    "launch_gemm": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_residual": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_gelu7": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_swiglu7": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_qkv": {WIDE: {256, 64}, SQUARE: {128, 64}},
}
CASES = [(source, tile) for source, tiles in PRODUCTS.items() for tile in tiles]


@dataclass(frozen=True)
class Kernel:
    resources: str  # what ptxas reports
    code: str  # SASS


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Kernel]:
    """Every compiled kernel by source and tile."""
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
    path = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    folder = tmp_path_factory.mktemp("machine_code")

    def run(command: list[str | Path], text: str | None = None) -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, input=text, env={**os.environ, "PATH": path}
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def compile_one(name: str) -> dict[tuple[str, str], Kernel]:
        cubin = folder / f"{name}.cubin"
        flags = ["-std=c++20", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CSRC}", f"-I{include}"]
        # ptxas says so, and no more, when it serialises products: its warnings are errors.
        strict = ["-Werror", "all-warnings", "-Xptxas=-v,--warn-on-spills,-Werror"]
        report = run([nvcc, *flags, *strict, "-cubin", CSRC / "gemm" / f"{name}.cu", "-o", cubin])
        report = run([demangler], report)
        code = run([demangler], run([cuobjdump, "-sass", cubin]))
        found = {}
        for tile in PRODUCTS[name]:
            kernel = f"gemm_sm90<magihuman::gemm::{tile}"
            (resources,) = [part for part in report.split("Compiling entry function") if kernel in part]
            (sass,) = [part for part in code.split("Function : ")[1:] if kernel in part.split("\n")[0]]
            found[name, tile] = Kernel(resources, sass)
        return found

    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(compile_one, PRODUCTS)
        return {key: kernel for part in parts for key, kernel in part.items()}


def test_every_source_is_in_the_table() -> None:
    assert sorted(path.stem for path in CSRC.glob("gemm/*.cu")) == sorted(PRODUCTS)


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_nothing_spills(kernels: dict[tuple[str, str], Kernel], source: str, tile: str) -> None:
    kernel = kernels[source, tile]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.resources
    assert not re.search(r"\b(LDL|STL)\b", kernel.code)


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_products_and_copies(kernels: dict[tuple[str, str], Kernel], source: str, tile: str) -> None:
    code = kernels[source, tile].code
    shapes = re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16 ", code)
    assert {int(n) for n in shapes} == PRODUCTS[source][tile]
    # Four to a stage, for the first block of K and for the others.
    assert len(shapes) == 8 * len(PRODUCTS[source][tile])
    multicasts = re.findall(r"UTMALDG\.2D\.MULTICAST ", code)
    assert re.search(r"UTMALDG\.2D ", code)
    assert len(multicasts) == (4 if tile == WIDE else 0)
    assert re.search(r"SYNCS\.ARRIVE\.TRANS64\.RED", code) if tile == WIDE else True


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_registers(kernels: dict[tuple[str, str], Kernel], source: str, tile: str) -> None:
    kernel = kernels[source, tile]
    assert f"Used {REGISTERS_AT_START} registers" in kernel.resources
    moves = re.findall(r"USETMAXREG\.(\w+)\.CTAPOOL\s+(?:UP\d+, )?(0x[0-9a-f]+)", kernel.code)
    assert sorted((kind, int(count, 16)) for kind, count in moves) == [
        ("DEALLOC", PRODUCER),
        ("TRY_ALLOC", CONSUMER),
    ]
    assert max(int(number) for number in re.findall(r"\bR(\d+)\b", kernel.code)) < CONSUMER


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_rows_leave_in_whole_lines(kernels: dict[tuple[str, str], Kernel], source: str, tile: str) -> None:
    # bf16 rows as 16 bytes a lane; the float32 stream as 8, four lanes to a sector.
    code = kernels[source, tile].code
    assert re.search(r"STG\.E\.64 " if source == "launch_gemm_residual" else r"STG\.E\.128 ", code)


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_no_fence_before_remote_arrivals(
    kernels: dict[tuple[str, str], Kernel], source: str, tile: str
) -> None:
    # A fence of the whole device before each release would stall every stage.
    lines = [x for x in kernels[source, tile].code.splitlines() if re.search(r"^\s+/\*[0-9a-f]{4,}\*/", x)]
    arrivals = [i for i, line in enumerate(lines) if "SYNCS.ARRIVE" in line]
    assert arrivals
    assert not any("MEMBAR" in line for i in arrivals for line in lines[max(i - 6, 0) : i])
