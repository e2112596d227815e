"""What nvcc makes of gated attention: no spills, the intended products, and the overlap that the source asks for."""

from __future__ import annotations

import re

import pytest

from built_once import CSRC
from machine_code import Kernel, compile_kernels, registers_of

pytestmark = pytest.mark.slow  # nvcc and the disassembler

# Keys of a tile by the configuration's name. Threads share 65536 registers: 384 of them start with 168 each; then one
# warpgroup keeps 40 and two take 232.
TILES = {"TileConfig<176, 4, 2>": 176, "TileConfig<176, 4, 1>": 176, "TileConfig<128, 6, 1>": 128}
PAIRS = "TileConfig<176, 4, 2>"
REGISTERS_AT_START, PRODUCER, CONSUMER = 168, 40, 232
HEAD = 128


@pytest.fixture(scope="session")
def kernels() -> dict[str, Kernel]:
    source = CSRC / "attention" / "launch_gated_attention.cu"
    compiled = compile_kernels([source])[source.stem]
    return {tile: compiled.of(f"gated_attention_sm90<magihuman::attention::{tile}") for tile in TILES}


def loop(kernel: Kernel) -> tuple[list[str], int]:
    """The instructions of the loop over key tiles, and where in it the wait for the scores is."""
    code = kernel.instructions
    # One wait there leaves a product running: the one between scores and values.
    (middle,) = (i for i, line in enumerate(code) if "WARPGROUP.DEPBAR.LE gsb0, 0x1" in line)
    for end in range(middle, len(code)):
        branch = re.search(r"BRA (0x[0-9a-f]+)", code[end])
        if branch and kernel.index_of(branch[1]) < middle:
            first = kernel.index_of(branch[1])
            return code[first : end + 1], middle - first
    pytest.fail("no branch back to the top of the loop")


def registers(operand: str, count: int) -> range:
    first = int(operand.removeprefix("R"))
    return range(first, first + count)


@pytest.mark.parametrize("tile", TILES)
def test_nothing_spills(kernels: dict[str, Kernel], tile: str) -> None:
    kernel = kernels[tile]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel.resources
    assert not re.search(r"\b(LDL|STL)\b", kernel.code)


@pytest.mark.parametrize("tile", TILES)
def test_registers(kernels: dict[str, Kernel], tile: str) -> None:
    kernel = kernels[tile]
    assert f"Used {REGISTERS_AT_START} registers" in kernel.resources
    assert kernel.register_moves() == [("DEALLOC", PRODUCER), ("TRY_ALLOC", CONSUMER)]
    assert kernel.highest_register() < CONSUMER
    code = kernel.instructions
    (first,) = (i for i, line in enumerate(code) if "USETMAXREG.DEALLOC" in line)
    last = next(i for i in range(first, len(code)) if "EXIT" in code[i])
    assert max(registers_of("\n".join(code[first:last]))) < PRODUCER


@pytest.mark.parametrize("tile", TILES)
def test_products_and_copies(kernels: dict[str, Kernel], tile: str) -> None:
    keys, code = TILES[tile], kernels[tile].code
    scores = re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16 R\d+, gdesc\[", code)
    outputs = re.findall(r"HGMMA\.64x(\d+)x16\.F32\.BF16 R\d+, R\d+, gdesc\[UR\d+\]\.tnspB", code)
    # The first tile and the loop; the loop and the last tile.
    assert scores == [str(keys)] * (2 * HEAD // 16)
    assert outputs == [str(HEAD)] * (2 * keys // 16)
    assert len(re.findall(r"HGMMA", code)) == len(scores) + len(outputs)
    assert re.search(r"UTMALDG\.3D ", code)
    # Of k0, k1 .., v0 ..: the half that this block fetches for both.
    multicasts = re.findall(r"UTMALDG\.3D\.MULTICAST ", code)
    assert bool(multicasts) == (tile == PAIRS)
    assert bool(re.search(r"SYNCS\.ARRIVE\.TRANS64\.RED", code)) == (tile == PAIRS)
    assert re.search(r"STG\.E\.128 ", code)


@pytest.mark.parametrize("tile", TILES)
def test_nothing_waits_for_all_of_memory(kernels: dict[str, Kernel], tile: str) -> None:
    # A fence of the whole device before a remote arrival would stall every key tile, one at a meeting of the pair every
    # launch.
    code = kernels[tile].code
    assert "SYNCS.ARRIVE" in code
    assert "MEMBAR" not in code
    assert len(re.findall(r"UCGABAR_(?:ARV|WAIT)", code)) == (2 if tile == PAIRS else 0)


@pytest.mark.parametrize("tile", TILES)
def test_softmax_runs_beside_the_second_product(kernels: dict[str, Kernel], tile: str) -> None:
    body, middle = loop(kernels[tile])
    keys = TILES[tile]
    exponentials = [i for i, line in enumerate(body) if "MUFU.EX2" in line]
    assert len(exponentials) == keys // 2 + 2  # and what the sums so far are multiplied by
    assert min(exponentials) > middle
    issued = [i for i, line in enumerate(body) if "HGMMA" in line]
    assert max(issued) < middle
    # The other warpgroup's turn comes as soon as everything is issued.
    (turn,) = (i for i, line in enumerate(body) if "BAR.ARV" in line)
    assert max(issued) < turn < min(exponentials)


@pytest.mark.parametrize("tile", TILES)
def test_what_the_second_product_uses_is_left_alone(kernels: dict[str, Kernel], tile: str) -> None:
    body, middle = loop(kernels[tile])
    products = [
        (i, found)
        for i, line in enumerate(body)
        if (found := re.search(r"HGMMA\.64x128x16\.F32\.BF16 (R\d+), (R\d+), gdesc", line))
    ]
    busy = {r for _, found in products for r in registers(found[2], 4)}
    assert len(busy) == TILES[tile] // 4
    busy |= set(registers(products[0][1][1], HEAD // 2))
    assert middle > products[-1][0]
    # Until the wait at the top of the loop, which the next round comes to first.
    waited = next(i for i, line in enumerate(body) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line)
    for line in (*body[products[-1][0] + 1 :], *body[:waited]):
        assert "HGMMA" not in line
        assert not busy & registers_of(line), line
