"""What nvcc makes of the matrix kernels: no spills, no local memory, tensor-core and copy-engine instructions, and the
registers of each role as planned."""

from __future__ import annotations

import re

import pytest

from built_once import CSRC
from machine_code import Kernel, compile_kernels, registers_of

pytestmark = pytest.mark.slow  # nvcc and the disassembler

# Threads share 65536 registers: 384 of them start with 168 each; then one warpgroup keeps 40 and two take 232.
REGISTERS_AT_START, PRODUCER, CONSUMER = 168, 40, 232

# Source, and what its two kernels multiply: products of 64 rows by the tile's columns, or by 64 for the gates.
WIDE, SQUARE = "TileConfig<256, 2, 4>", "TileConfig<128, 1, 6>"
PRODUCTS = {
    "launch_gemm": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_residual": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_gelu7": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_swiglu7": {WIDE: {256}, SQUARE: {128}},
    "launch_gemm_qkv": {WIDE: {256, 64}, SQUARE: {128, 64}},
}
CASES = [(source, tile) for source, tiles in PRODUCTS.items() for tile in tiles]


@pytest.fixture(scope="session")
def kernels() -> dict[tuple[str, str], Kernel]:
    """Every compiled kernel by source and tile."""
    sources = [CSRC / "gemm" / f"{name}.cu" for name in PRODUCTS]
    compiled = compile_kernels(sources)
    return {
        (source, tile): compiled[source].of(f"gemm_sm90<magihuman::gemm::{tile}") for source, tile in CASES
    }


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
    assert kernel.register_moves() == [("DEALLOC", PRODUCER), ("TRY_ALLOC", CONSUMER)]
    assert kernel.highest_register() < CONSUMER
    code = kernel.instructions
    (first,) = (i for i, line in enumerate(code) if "USETMAXREG.DEALLOC" in line)
    last = next(i for i in range(first, len(code)) if "EXIT" in code[i])
    assert max(registers_of("\n".join(code[first:last]))) < PRODUCER


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_rows_leave_in_whole_lines(kernels: dict[tuple[str, str], Kernel], source: str, tile: str) -> None:
    # bf16 rows as 16 bytes a lane; the float32 stream is added to 8 at a time, four lanes to a sector.
    code = kernels[source, tile].code
    assert re.search(r"REDG\.E\.ADD\.F32x2" if source == "launch_gemm_residual" else r"STG\.E\.128 ", code)


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_nothing_waits_for_all_of_memory(
    kernels: dict[tuple[str, str], Kernel], source: str, tile: str
) -> None:
    # A fence of the whole device before a remote arrival would stall every stage, one at a meeting of the pair every
    # launch.
    code = kernels[source, tile].code
    assert "SYNCS.ARRIVE" in code
    assert "MEMBAR" not in code
    assert len(re.findall(r"UCGABAR_(?:ARV|WAIT)", code)) == (2 if tile == WIDE else 0)
