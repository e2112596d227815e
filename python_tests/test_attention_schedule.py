"""Which query tile visits which key tiles, held to the dense mask at the model's sizes, and the choice of the tile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from sim_library import TEXT

BLOCK_M = 128
# Video rows, all rows, rows computed, rows of a frame (0: no window), radius.
SIZES = {
    "256p": (3584, 4110, 4110, 0, 0),
    "256p without text queries": (3584, 4110, 3710, 0, 0),
    "540p": (16320, 16846, 16846, 0, 0),
    "1080p full": (65280, 65806, 65806, 0, 0),
    "1080p window": (65280, 65806, 65806, 2040, 11),
    "1080p window without text queries": (65280, 65806, 65406, 2040, 11),
    "1080p portrait of 10 s": (128520, 129000, 129000, 2040, 11),
    "frames of a tile and one": (129 * 20, 129 * 20 + 50, 129 * 20 + 50, 129, 3),
    "frames of few rows": (12 * 32, 12 * 32 + 11, 12 * 32 + 11, 12, 1),
    "radius 0": (100 * 9, 100 * 9 + 200, 100 * 9 + 200, 100, 0),
    "radius beyond the clip": (100 * 9, 100 * 9 + 200, 100 * 9 + 200, 100, 50),
    "video alone": (100 * 9, 100 * 9, 100 * 9, 100, 2),
    "no video": (0, 333, 333, 100, 2),
    "one row": (1, 1, 1, 1, 0),
}
Tokens = tuple[int, int, int, int, int]


class Tile:
    """A query tile as csrc/attention/schedule.h gives it."""

    def __init__(self, attention_library: ctypes.CDLL, tokens: Tokens, index: int, block_n: int) -> None:
        self.library, self.tokens, self.index, self.block_n = (
            attention_library,
            (ctypes.c_int * 5)(*tokens),
            index,
            block_n,
        )
        found = (ctypes.c_int * 3)()
        attention_library.attention_query_tile(self.tokens, index, block_n, found)
        self.row, self.end, self.key_tiles = found

    def key_tile(self, j: int, row: int) -> tuple[int, bool, int, int]:
        """First key, whether it is masked, and the range of keys that `row` may see of it."""
        found = (ctypes.c_int * 4)()
        self.library.attention_key_tile(self.tokens, self.index, self.block_n, j, row, found)
        return found[0], bool(found[1]), found[2], found[3]


def tiles(attention_library: ctypes.CDLL, tokens: Tokens, block_n: int) -> Iterator[Tile]:
    for index in range(attention_library.attention_query_tiles((ctypes.c_int * 5)(*tokens))):
        yield Tile(attention_library, tokens, index, block_n)


def seen_by_rule(tokens: Tokens, row: int) -> np.ndarray:
    """One row of the dense mask."""
    video, rows, _, frame, radius = tokens
    keys = np.arange(rows)
    if frame == 0 or row >= video:
        return np.ones(rows, dtype=bool)
    return (np.abs(keys // frame - row // frame) <= radius) | (keys >= video)


@pytest.mark.parametrize("block_n", [176, 128])
@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
def test_visits_are_the_dense_mask(attention_library: ctypes.CDLL, tokens: Tokens, block_n: int) -> None:
    video, rows, queries, frame, _ = tokens
    covered = []
    for tile in tiles(attention_library, tokens, block_n):
        assert 0 < tile.end - tile.row <= BLOCK_M
        covered.append((tile.row, tile.end))
        # Rows of one frame see the same keys: the first and last row of each frame stand for all.
        step = frame or BLOCK_M
        edges = {tile.row, tile.end - 1}
        edges |= {r for f in range(tile.row // step, tile.end // step + 1) for r in (f * step - 1, f * step)}
        for row in sorted(r for r in edges if tile.row <= r < tile.end):
            times = np.zeros(rows, dtype=int)
            for j in range(tile.key_tiles):
                start, masked, begin, end = tile.key_tile(j, row)
                assert start + block_n <= rows, "keys behind the last one would be read"
                assert start + block_n > 0, "a tile without a key"
                if masked:
                    first, last = max(start, begin, 0), min(start + block_n, end)
                else:
                    first, last = start, start + block_n
                    assert first >= 0, "rows before the first one are seen"
                if first < last:
                    times[first:last] += 1
            assert (times == seen_by_rule(tokens, row)).all(), f"row {row}"
    # Every row that is computed, once.
    covered.sort()
    assert all(a[1] == b[0] for a, b in pairwise(covered))
    assert (covered[0][0], covered[-1][1]) == (0, queries)
    if frame:
        assert video in {0, queries, *(row for row, _ in covered)}, "a tile with video and other rows"


def visits(attention_library: ctypes.CDLL, tokens: Tokens, block_n: int = 176) -> list[int]:
    return [tile.key_tiles for tile in tiles(attention_library, tokens, block_n)]


def test_key_tiles_outside_the_window_are_never_loaded(attention_library: ctypes.CDLL) -> None:
    tokens = SIZES["1080p window"]
    loaded = 176 * sum(visits(attention_library, tokens))
    pairs = sum(seen_by_rule(tokens, row).sum() for row in range(0, tokens[0], 2040)) * 2040
    pairs += tokens[1] * (tokens[1] - tokens[0])
    # Rounding up to key tiles, and tiles of queries that lie in two frames.
    assert 1 <= loaded * BLOCK_M / pairs < 1.015


def test_some_rows_see_nothing_of_a_tile_that_is_loaded(attention_library: ctypes.CDLL) -> None:
    # What the running softmax must survive: the first tile of a row holds no key that it sees.
    (tile,) = (t for t in tiles(attention_library, (300, 323, 323, 100, 0), 176) if t.row == 0)
    start, masked, begin, end = tile.key_tile(0, 127)
    assert masked
    assert start + 176 <= begin < end
    assert tile.key_tile(0, 0)[3] > max(start, 0)


@pytest.mark.parametrize("name", ["1080p window", "1080p window without text queries"])
def test_long_tiles_come_first(attention_library: ctypes.CDLL, name: str) -> None:
    counts = visits(attention_library, SIZES[name])
    longest = max(counts)
    assert counts[0] == longest
    # A tile in two frames sees one frame more, so neighbours may differ by that much the wrong way.
    frame = -(-2040 // 176)
    assert all(b <= a + frame for a, b in pairwise(counts))
    assert counts[-1] < 0.65 * counts[len(counts) // 2]


@pytest.mark.parametrize("name", ["256p", "540p", "1080p full", "1080p window"])
def test_blocks_finish_together(attention_library: ctypes.CDLL, name: str) -> None:
    # 8 kv heads, one after another, each query tile five times; units dealt out to 132 blocks, every other round
    # backwards.
    units = np.tile(np.repeat(visits(attention_library, SIZES[name]), 5), 8)
    units = np.pad(units, (0, -len(units) % 132)).reshape(-1, 132)
    units[1::2] = units[1::2, ::-1]
    work = units.sum(0)
    assert work.max() < 1.007 * work.mean()


def verdicts(attention_library: ctypes.CDLL, *problem: int) -> dict[str, str]:
    text = ctypes.create_string_buffer(TEXT)
    queries, heads, keys, num_sms = problem
    attention_library.attention_tile_verdicts(
        *(ctypes.c_int64(x) for x in (queries, heads, keys)), num_sms, text
    )
    return dict(line.split(": ", 1) for line in text.value.decode().splitlines())


@pytest.mark.parametrize(
    ("queries", "keys", "rounds"),
    [(4110, 4110, 10), (16846, 16846, 40), (65806, 65806, 157), (65806, 23 * 2040, 157)],
)
def test_the_model_runs_in_wide_tiles(
    attention_library: ctypes.CDLL,
    queries: int,
    keys: int,
    rounds: int,
) -> None:
    found = verdicts(attention_library, queries, 40, keys, 132)
    assert found["* 128x176"].startswith(f"{rounds} rounds of 132 for ")
    assert f"of {-(-keys // 176)} key tiles" in found["* 128x176"]
    assert found["- 128x192"] == "needs 240 registers a thread, 232 are there"
    assert found["- 192x128"] == "needs 192 registers a thread, 152 are there"
    assert " rounds of 132 for " in found["- 128x128"]


def test_few_keys_take_the_smaller_tile(attention_library: ctypes.CDLL) -> None:
    assert "* 128x128" in verdicts(attention_library, 128, 40, 128, 132)
    assert "* 128x176" in verdicts(attention_library, 128, 40, 176, 132)


def test_shared_memory_is_as_planned(attention_library: ctypes.CDLL) -> None:
    # 128 queries, 4 or 6 tiles of keys or values, 256 bytes a row; two barriers a slot and a warpgroup.
    assert attention_library.attention_shared_bytes(1) == 256 * (128 + 4 * 176) + 8 * 2 * (4 + 2)
    assert attention_library.attention_shared_bytes(0) == 256 * (128 + 6 * 128) + 8 * 2 * (6 + 2)
