"""What nvcc makes of the decoder's kernels: no spills, no local memory, the products and copies that were meant."""

from __future__ import annotations

import re

import pytest

from built_once import CSRC
from machine_code import Kernel, compile_kernels

pytestmark = pytest.mark.slow  # nvcc and the disassembler

# Threads share 65536 registers: 384 of them start with 168 each; then one warpgroup keeps 40 and two take 232.
REGISTERS_AT_START, PRODUCER, CONSUMER = 168, 40, 232
# Source: its tiles (vertical taps, channels, units of a warpgroup and their rows, blocks of a cluster, stages of both
# rings). Units of 32 rows are columns of the products.
TILES: dict[str, list[tuple[int, ...]]] = {
    "launch_conv_3x3": [(3, 256, 1, 8, 2, 3, 4), (3, 128, 2, 8, 1, 2, 6), (3, 64, 1, 32, 1, 2, 5)],
    "launch_conv_upsample": [(2, 256, 1, 8, 2, 3, 4), (2, 128, 2, 8, 1, 3, 5)],
    "launch_conv_line": [(1, 256, 1, 8, 2, 4, 4), (1, 128, 2, 8, 1, 4, 4)],
    "launch_conv_picture": [(3, 16, 2, 8, 1, 4, 6)],
}
POINTWISE = {"channel_norm": "channel_norm_sm90", "latent_pixels": "latent_pixels_sm90"}
CASES = [(source, tile) for source, tiles in TILES.items() for tile in tiles]
Kernels = dict[tuple[str, str], Kernel]


def name_of(tile: tuple[int, ...]) -> str:
    return f"conv_sm90<magihuman::conv::TileConfig<{', '.join(map(str, tile))}>"


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """Every compiled kernel of csrc/conv by source and name."""
    names = {source: [name_of(tile) for tile in tiles] for source, tiles in TILES.items()}
    names |= {source: [kernel] for source, kernel in POINTWISE.items()}
    sources = [CSRC / "conv" / f"{source}.cu" for source in names]
    found = compile_kernels(sources)
    return {(source, name): found[source].of(name) for source in names for name in names[source]}


def check_no_spills(kernel: Kernel) -> None:
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.resources
    assert not re.search(r"\b(LDL|STL)\b", kernel.code)


def test_every_source_is_in_the_table() -> None:
    assert sorted(path.stem for path in CSRC.glob("conv/*.cu")) == sorted([*TILES, *POINTWISE])


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_convolution(kernels: Kernels, source: str, tile: tuple[int, ...]) -> None:
    kernel = kernels[source, name_of(tile)]
    check_no_spills(kernel)
    assert f"Used {REGISTERS_AT_START} registers" in kernel.resources
    assert kernel.register_moves() == [("DEALLOC", PRODUCER), ("TRY_ALLOC", CONSUMER)]
    assert kernel.highest_register() < CONSUMER
    taps_y, channels, units, rows, blocks, *_ = tile
    # A fence of the whole device before a remote arrival would stall every stage, one at a meeting of the pair every
    # launch.
    assert "SYNCS.ARRIVE" in kernel.code
    assert "MEMBAR" not in kernel.code
    assert len(re.findall(r"UCGABAR_(?:ARV|WAIT)", kernel.code)) == (2 if blocks == 2 else 0)
    shapes = re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16 ", kernel.code)
    assert {int(n) for n in shapes} == {channels if rows == 8 else 8 * rows}
    # Four to 64 channels, tap and unit, for the first box and for the others.
    assert len(shapes) == 2 * 4 * taps_y * units
    # A box of pixels per unit and stage, of rank 4; weights for each tap, of rank 3, in a pair for both blocks.
    assert len(re.findall(r"UTMALDG\.4D ", kernel.code)) == 2 * units
    weights = re.findall(r"UTMALDG\.3D(\.MULTICAST)? ", kernel.code)
    assert weights == [".MULTICAST" if blocks == 2 else ""] * taps_y


@pytest.mark.parametrize(("source", "tile"), CASES)
def test_pixels_leave_in_whole_lines(kernels: Kernels, source: str, tile: tuple[int, ...]) -> None:
    code = kernels[source, name_of(tile)].code
    if source == "launch_conv_picture":
        assert re.search(r"STG\.E\.U16 ", code)
        return
    assert re.search(r"STG\.E\.128 ", code)
    assert not re.search(r"STG\.E(\.U16|\.U8|\.64)? ", code)
    assert re.search(r"LDSM\.16\.M88\.4 ", code)  # the shortcut, as the products' layout has it
    assert re.search(r"CCTL\.E\.PF2|CCTL\.PF2|PREFETCH|CCTL", code)


@pytest.mark.parametrize("source", POINTWISE)
def test_pointwise(kernels: Kernels, source: str) -> None:
    kernel = kernels[source, POINTWISE[source]]
    check_no_spills(kernel)
    assert re.search(r"STG\.E\.128 ", kernel.code)
    if source == "channel_norm":
        # Four pixels of two vectors under way before the first is reduced.
        first_sum = kernel.code.index("SHFL.BFLY")
        assert len(re.findall(r"LDG\.E\.128 ", kernel.code[:first_sum])) == 8
        registers = re.search(r"Used (\d+) registers", kernel.resources)
        assert registers is not None
        assert int(registers[1]) <= 64  # four blocks of 256 threads to a multiprocessor
