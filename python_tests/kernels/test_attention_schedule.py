"""Which query tile visits which key tiles, held to the dense mask at the model's sizes, and the choice of the tile."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
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
    "100,000 rows": (96000, 100000, 100000, 2400, 11),
    "frames of a tile and one": (129 * 20, 129 * 20 + 50, 129 * 20 + 50, 129, 3),
    "frames of few rows": (12 * 32, 12 * 32 + 11, 12 * 32 + 11, 12, 1),
    "radius 0": (100 * 9, 100 * 9 + 200, 100 * 9 + 200, 100, 0),
    "radius beyond the clip": (100 * 9, 100 * 9 + 200, 100 * 9 + 200, 100, 50),
    "video alone": (100 * 9, 100 * 9, 100 * 9, 100, 2),
    "no video": (0, 333, 333, 100, 2),
    "one row": (1, 1, 1, 1, 0),
}
Tokens = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Schedule:
    """csrc/attention/schedule.h for one problem."""

    library: ctypes.CDLL
    tokens: Tokens
    heads: tuple[int, int] = (1, 1)  # query, key and value
    cluster: int = 1  # blocks that work on one unit
    block_n: int = 176

    @property
    def problem(self) -> ctypes.Array[ctypes.c_int]:
        return (ctypes.c_int * 9)(*self.tokens, *self.heads, self.cluster, self.block_n)

    def __len__(self) -> int:
        return int(self.library.attention_units(self.problem))

    def assignment(self, unit: int, rank: int) -> Assignment:
        found = (ctypes.c_int * 6)()
        self.library.attention_assignment(self.problem, unit, rank, found)
        return Assignment(self, unit, rank, *found)

    def units(self) -> Iterator[list[Assignment]]:
        """What the blocks of each unit do."""
        for unit in range(len(self)):
            yield [self.assignment(unit, rank) for rank in range(self.cluster)]


@dataclass(frozen=True)
class Assignment:
    """A query tile of one head, rows row .. end; none where they are equal."""

    schedule: Schedule
    unit: int
    rank: int
    row: int
    end: int
    key_tiles: int
    q_head: int
    kv_head: int
    shared: int

    def key_tiles_of(self, row: int) -> np.ndarray:
        """Of each key tile: the first key, whether it is masked, and the range of keys that `row` may see of it."""
        found = np.empty((self.key_tiles, 4), dtype=np.intc)
        s = self.schedule
        s.library.attention_key_tiles(
            s.problem, self.unit, self.rank, self.key_tiles, row, ctypes.c_void_p(found.ctypes.data)
        )
        return found

    def key_tile(self, j: int, row: int) -> tuple[int, bool, int, int]:
        start, masked, begin, end = self.key_tiles_of(row)[j].tolist()
        return start, bool(masked), begin, end


def seen_by_rule(tokens: Tokens, row: int) -> np.ndarray:
    """One row of the dense mask."""
    video, _, _, frame, _ = tokens
    return seen_from_frame(tokens, None if frame == 0 or row >= video else row // frame)


@lru_cache(maxsize=8)  # all rows of a frame see the same, and all others everything
def seen_from_frame(tokens: Tokens, of_row: int | None) -> np.ndarray:
    video, rows, _, frame, radius = tokens
    if of_row is None:
        return np.ones(rows, dtype=bool)
    keys = np.arange(rows)
    return (np.abs(keys // frame - of_row) <= radius) | (keys >= video)


def check_keys(tile: Assignment, tokens: Tokens, block_n: int) -> None:
    """Every row of a tile visits the keys it sees, each once, and reads no row beyond those in use."""
    rows, step = tokens[1], tokens[3] or BLOCK_M
    # Rows of one frame see the same keys: the first and last row of each frame stand for all.
    edges = {tile.row, tile.end - 1}
    edges |= {r for f in range(tile.row // step, tile.end // step + 1) for r in (f * step - 1, f * step)}
    for row in sorted(r for r in edges if tile.row <= r < tile.end):
        start, masked, begin, end = tile.key_tiles_of(row).T
        assert (start + block_n <= rows).all(), "keys behind the last one would be read"
        assert (start + block_n > 0).all(), "a tile without a key"
        assert (start[masked == 0] >= 0).all(), "rows before the first one are seen"
        first = np.where(masked, np.maximum(np.maximum(start, begin), 0), start)
        last = np.where(masked, np.minimum(start + block_n, end), start + block_n)
        some = first < last
        # Up by one where a tile's keys begin, down where they end.
        steps = np.bincount(first[some], minlength=rows + 1) - np.bincount(last[some], minlength=rows + 1)
        assert (np.cumsum(steps)[:rows] == seen_by_rule(tokens, row)).all(), f"row {row}"


@pytest.mark.parametrize(("cluster", "block_n"), [(2, 176), (1, 176), (1, 128)])
@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
def test_visits_are_the_dense_mask(
    attention_library: ctypes.CDLL, tokens: Tokens, cluster: int, block_n: int
) -> None:
    for blocks in Schedule(attention_library, tokens, (1, 1), cluster, block_n).units():
        for tile in blocks:
            check_keys(tile, tokens, block_n)


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (4, 4), (15, 3)])
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("tokens", SIZES.values(), ids=SIZES.keys())
def test_every_row_of_every_head_once(
    attention_library: ctypes.CDLL, tokens: Tokens, cluster: int, heads: tuple[int, int]
) -> None:
    video, _, queries, frame, _ = tokens
    covered: dict[int, list[tuple[int, int]]] = {head: [] for head in range(heads[0])}
    for blocks in Schedule(attention_library, tokens, heads, cluster).units():
        first = blocks[0]
        assert first.end > first.row, "a unit whose first block has nothing to do"
        for tile in blocks:
            assert tile.kv_head == tile.q_head // (heads[0] // heads[1])
            assert 0 <= tile.end - tile.row <= BLOCK_M
            # Both blocks fill and empty their rings alike; what is shared is the same.
            assert tile.key_tiles == first.key_tiles
            assert tile.shared == first.shared
            if tile.shared:
                assert tile.kv_head == first.kv_head
                starts = [[t.key_tile(j, t.row)[0] for j in (0, t.key_tiles - 1)] for t in (tile, first)]
                assert starts[0] == starts[1]
            if tile.end > tile.row:
                covered[tile.q_head].append((tile.row, tile.end))
    for ranges in covered.values():
        ranges.sort()
        assert all(a[1] == b[0] for a, b in pairwise(ranges))
        assert (ranges[0][0], ranges[-1][1]) == (0, queries)
        if frame:
            assert video in {0, queries, *(row for row, _ in ranges)}, "a tile with video and other rows"


def test_the_model_fills_every_round_at_256p(attention_library: ctypes.CDLL) -> None:
    # 33 query tiles of 40 heads are 1320; each kv head has an odd one left, and those pair as well.
    schedule = Schedule(attention_library, SIZES["256p"], (40, 8), 2)
    assert len(schedule) == 660 == 10 * 66
    unshared = [blocks for blocks in schedule.units() if not blocks[0].shared]
    assert len(unshared) == 4
    assert {tile.kv_head for blocks in unshared for tile in blocks} == set(range(8))


def visits(library: ctypes.CDLL, tokens: Tokens, cluster: int) -> list[int]:
    """Key tiles of every unit at the model's heads."""
    return [blocks[0].key_tiles for blocks in Schedule(library, tokens, (40, 8), cluster).units()]


@pytest.mark.parametrize("cluster", [1, 2])
def test_key_tiles_outside_the_window_are_never_loaded(attention_library: ctypes.CDLL, cluster: int) -> None:
    tokens = SIZES["1080p window"]
    loaded = 176 * cluster * BLOCK_M * sum(visits(attention_library, tokens, cluster))
    pairs = sum(seen_by_rule(tokens, row).sum() for row in range(0, tokens[0], 2040)) * 2040
    pairs += tokens[1] * (tokens[1] - tokens[0])
    # Rounding up to key tiles, and tiles (or pairs) of queries that lie in two frames.
    assert 1 <= loaded / (40 * pairs) < (1.015, 1.018)[cluster - 1]


@pytest.mark.parametrize("cluster", [1, 2])
def test_some_rows_see_nothing_of_a_tile_that_is_loaded(attention_library: ctypes.CDLL, cluster: int) -> None:
    # What the running softmax must survive: the first tile of a row holds no key that it sees.
    schedule = Schedule(attention_library, (300, 323, 323, 100, 0), cluster=cluster)
    (blocks,) = (blocks for blocks in schedule.units() if blocks[0].row == 0)
    last = blocks[-1]
    start, masked, begin, end = last.key_tile(0, last.end - 1)
    assert masked
    assert start + 176 <= begin < end
    assert blocks[0].key_tile(0, 0)[3] > max(start, 0)


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("name", ["1080p window", "1080p window without text queries"])
def test_long_tiles_come_first(attention_library: ctypes.CDLL, name: str, cluster: int) -> None:
    counts = visits(attention_library, SIZES[name], cluster)
    longest = max(counts)
    assert counts[0] == longest
    # Of one kv head. A tile in two frames sees one frame more, so neighbours may differ by that much the wrong way.
    odd = len(counts) % 8
    own = counts[odd : odd + (len(counts) - odd) // 8]
    frame = -(-2040 // 176)
    assert all(b <= a + frame for a, b in pairwise(own))
    assert own[-1] < 0.65 * own[len(own) // 2]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("name", ["256p", "540p", "1080p full", "1080p window"])
def test_blocks_finish_together(attention_library: ctypes.CDLL, name: str, cluster: int) -> None:
    # Units dealt out to 132 blocks, alone or in pairs, every other round backwards.
    units = np.array(visits(attention_library, SIZES[name], cluster))
    clusters = 132 // cluster
    units = np.pad(units, (0, -len(units) % clusters)).reshape(-1, clusters)
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
    assert found["* 128x176, pairs"].startswith(f"{rounds} rounds of 66 for ")
    assert f"of {-(-keys // 176)} key tiles" in found["* 128x176, pairs"]
    assert found["- 128x176"].startswith(f"{rounds} rounds of 132 for ")
    assert found["- 128x192"] == "needs 240 registers a thread, 232 are there"
    assert found["- 192x128"] == "needs 192 registers a thread, 152 are there"
    assert " rounds of 132 for " in found["- 128x128"]


def test_few_keys_take_the_smaller_tile(attention_library: ctypes.CDLL) -> None:
    assert "* 128x128" in verdicts(attention_library, 128, 40, 128, 132)
    assert "* 128x176, pairs" in verdicts(attention_library, 128, 40, 176, 132)
    assert "* 128x176" in verdicts(attention_library, 128, 40, 176, 1)
    assert verdicts(attention_library, 128, 40, 176, 1)["- 128x176, pairs"] == (
        "needs 2 multiprocessors, the grid has 1"
    )


def test_shared_memory_is_as_planned(attention_library: ctypes.CDLL) -> None:
    # 128 queries, 4 or 6 tiles of keys or values, 256 bytes a row; two barriers a slot and a warpgroup.
    for tile in (0, 1):
        bytes_of = attention_library.attention_shared_bytes(tile)
        assert bytes_of == 256 * (128 + 4 * 176) + 8 * 2 * (4 + 2)
    assert attention_library.attention_shared_bytes(2) == 256 * (128 + 6 * 128) + 8 * 2 * (6 + 2)
