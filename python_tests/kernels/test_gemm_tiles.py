"""The choice of tiles, their order, and bugs planted in the matrix product, which the simulator must find."""

from __future__ import annotations

import ctypes
from collections import Counter
from itertools import pairwise

import pytest
import test_gemm_gpu
import torch

from gemm_cases import KINDS, ROWS_AND_K, Problem, check, edge_case, make_problem, outputs_of
from magihuman_fast.kernels.dit_weights import padded_width
from magihuman_fast.kernels.self_check.comparison import IN_SIMULATOR, ON_GPU, SPARE_ROWS
from sim_library import TEXT, build_library

WIDE, SQUARE = "128x256, pairs", "128x128"


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return build_library("gemm")


def verdicts(library: ctypes.CDLL, m: int, n: int, k: int, groups: int = 1, num_sms: int = 132) -> list[str]:
    text = ctypes.create_string_buffer(TEXT)
    library.gemm_tile_verdicts(m, n, k, groups, num_sms, text)
    return text.value.decode().splitlines()


def chosen(lines: list[str]) -> str:
    (line,) = [line for line in lines if line.startswith("* ")]
    return line[2:].split(":")[0]


@pytest.mark.parametrize("m", [4110, 16846, 65806])
@pytest.mark.parametrize("nk", [(7208, 5120), (5120, 5120), (27392, 5120), (5120, 13696), (20480, 5120)])
def test_the_model_runs_in_wide_tiles(library: ctypes.CDLL, m: int, nk: tuple[int, int]) -> None:
    lines = verdicts(library, m, *nk)
    assert chosen(lines) == WIDE
    assert len(lines) == 2
    assert all(" rounds of " in line for line in lines)


def test_rounds_at_the_published_sizes(library: ctypes.CDLL) -> None:
    # 33 rows of tiles, the last with 14 rows: the odd one pairs along N, so 5 rounds, not 17 x 20 / 66 = 5.2.
    assert "5 rounds of 66 for 330 tiles" in verdicts(library, 4110, 5120, 5120)[0]
    assert "7 rounds of 66 for 462 tiles" in verdicts(library, 4110, 7168, 5120)[0]
    assert "27 rounds of 66 for 1766 tiles" in verdicts(library, 4110, 27392, 5120)[0]


def test_shared_memory_is_as_planned(library: ctypes.CDLL) -> None:
    # 4 stages of 48 KB or 6 of 32 KB, 8 warps' staging of 4 KB, two barriers a stage; a block may have 232448 bytes.
    assert library.gemm_shared_bytes(1) == 4 * 48 * 1024 + 8 * 4096 + 2 * 4 * 8
    assert library.gemm_shared_bytes(0) == 6 * 32 * 1024 + 8 * 4096 + 2 * 6 * 8


def test_little_work_is_spread_over_smaller_tiles(library: ctypes.CDLL) -> None:
    assert chosen(verdicts(library, 128, 5120, 5120)) == SQUARE
    assert chosen(verdicts(library, 4110, 5120, 5120, num_sms=1)) == SQUARE
    assert verdicts(library, 4110, 5120, 5120, num_sms=1)[0].endswith(
        "needs 2 multiprocessors, the grid has 1"
    )


def test_cases_run_with_the_tile_they_are_meant_for(library: ctypes.CDLL) -> None:
    for kind in KINDS:
        for tile, name in (("wide", WIDE), ("square", SQUARE)):
            for index in range(len(ROWS_AND_K)):
                p = edge_case(kind, tile, index)
                columns = {"gemm_swiglu7": 2 * p.d_cols, "gemm_qkv": p.n - p.heads[0]}.get(kind, p.n)
                lines = verdicts(library, p.capacity, columns, p.k, p.groups, p.num_sms)
                assert chosen(lines) == name, (kind, tile, index, lines)


@pytest.mark.parametrize("sms", [132, 114])
def test_model_shapes_run_with_the_tile_they_are_meant_for(library: ctypes.CDLL, sms: int) -> None:
    """The cases of test_gemm_gpu, on the grids of an H100 and an H200, and of the smaller H100."""
    for kind, size, k in test_gemm_gpu.LAYERS:
        columns = 128 * (size[0] + 2 * size[1]) if isinstance(size, tuple) else size
        columns = 2 * 13696 if kind == "gemm_swiglu7" else columns
        for rows in test_gemm_gpu.ROWS.values():
            assert chosen(verdicts(library, sum(rows) + 2, columns, k, 3, sms)) == WIDE
        num_sms = 1 if size in test_gemm_gpu.TWO_ROUNDS else sms
        rows = sum(test_gemm_gpu.SQUARE_ROWS) + 2
        assert chosen(verdicts(library, rows, columns, k, 3, num_sms)) == SQUARE, (kind, size)


@pytest.mark.parametrize("num_sms", [78, 114, 132])
def test_kernel_checks_run_with_the_tile_they_name(library: ctypes.CDLL, num_sms: int) -> None:
    for sizes in (IN_SIMULATOR, ON_GPU):
        for name, p in sizes.products.items():
            assert name in (WIDE, SQUARE)
            qkv = 128 * (p.heads[0] + 2 * p.heads[1])
            for columns in (p.n, p.n // 128 * 128, 2 * padded_width(p.n // 2), qkv, qkv + p.heads[0]):
                for experts in (1, 3):
                    rows = sum(p.rows) + SPARE_ROWS
                    lines = verdicts(library, rows, columns, p.k, experts, p.num_sms or num_sms)
                    assert chosen(lines) == name, (name, columns, lines)


# --- the order of tiles ---------------------------------------------------------------------------------------

TILE_ROWS, TILE_COLUMNS, NARROW_ROWS, BAND = 128, 256, 64, 8
CLUSTERS = 66  # pairs of blocks on 132 multiprocessors
ODD_COST = 0.65  # of a whole unit: its second warpgroup has no row


class ScheduledTile(ctypes.Structure):
    """As in csrc/gemm/tests/sim_library.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int)
        for name in ("round", "cluster", "rank", "group", "row", "column", "rows", "a_rows", "narrow", "odd")
    )


Unit = list[ScheduledTile]  # the tiles of one cluster's blocks in one round


def tiles_of(count: int, size: int = TILE_ROWS) -> int:
    return -(-count // size)


def bounds_of(rows: tuple[int, ...]) -> list[int]:
    return [0, *torch.tensor(rows).cumsum(0).tolist()]


def schedule(
    library: ctypes.CDLL,
    rows: tuple[int, ...],
    n_tiles: int,
    clusters: int,
    blocks: int = 2,
    narrow: bool = False,
) -> list[Unit]:
    """Every unit, round by round, and within one cluster by cluster."""
    offsets = (ctypes.c_int * 4)(*(bounds_of(rows) if len(rows) == 3 else [0, *rows * 3]))
    room = (ScheduledTile * (2 * (sum(tiles_of(r, NARROW_ROWS) for r in rows) + 3) * (n_tiles + 3)))()
    arguments = (offsets, len(rows), n_tiles, int(narrow), TILE_COLUMNS, blocks, clusters, room)
    tiles: list[ScheduledTile] = list(room[: library.gemm_schedule(*arguments)])
    tiles.sort(key=lambda t: (t.round, t.cluster, t.rank))
    units = [tiles[i : i + blocks] for i in range(0, len(tiles), blocks)]
    for unit in units:
        assert len({(t.round, t.cluster, t.group, t.narrow, t.odd) for t in unit}) == 1
        assert [t.rank for t in unit] == list(range(blocks))
    return units


def check_schedule(
    units: list[Unit], rows: tuple[int, ...], n_tiles: int, clusters: int, narrow: bool
) -> None:
    """Every tile once, as large as its range leaves it; what a pair shares; full rounds."""
    bounds = bounds_of(rows)
    stored = Counter((t.group, t.row, t.column, t.rows) for unit in units for t in unit if t.rows > 0)
    expected: set[tuple[int, int, int, int]] = set()
    for g, (start, end) in enumerate(pairwise(bounds)):
        columns = range(0, n_tiles * TILE_COLUMNS, TILE_COLUMNS)
        expected |= {
            (g, r, c, min(end - r, TILE_ROWS)) for r in range(start, end, TILE_ROWS) for c in columns
        }
        if narrow:
            edge = n_tiles * TILE_COLUMNS
            expected |= {(g, r, edge, min(end - r, NARROW_ROWS)) for r in range(start, end, NARROW_ROWS)}
    assert set(stored) == expected
    assert set(stored.values()) <= {1}
    for unit in units:
        if unit[0].odd:
            assert len({(t.row, t.a_rows) for t in unit}) == 1
        else:
            assert len({t.column for t in unit}) == 1
            assert all(t.a_rows == t.rows for t in unit)
    places = [(unit[0].round, unit[0].cluster) for unit in units]
    assert places == [divmod(i, clusters) for i in range(len(units))]
    # Narrow ones last.
    assert sorted(unit[0].narrow for unit in units) == [unit[0].narrow for unit in units]


# One range; three; ranges of one row of tiles, of fewer pairs than a band and of more than one band; none at all.
SCHEDULED_ROWS = (
    *((1,), (128,), (129,), (257,), (300,), (2048,), (2049,), (4110,), (5000,)),
    *((3630, 80, 400), (130, 70, 33), (0, 129, 5), (65, 0, 200), (0, 0, 66), (20, 0, 0), (100, 100, 100)),
    *((300, 290, 310), (80, 400, 2100), (5, 6, 4110), (0, 0, 0), (2304, 2305, 129)),
)


@pytest.mark.parametrize("rows", SCHEDULED_ROWS, ids=str)
def test_every_tile_comes_once(library: ctypes.CDLL, rows: tuple[int, ...]) -> None:
    for n_tiles in (1, 2, 3, 7, 20):
        for clusters in (1, 2, 3, 17, CLUSTERS):
            for blocks in (1, 2):
                for narrow in (False, True):
                    units = schedule(library, rows, n_tiles, clusters, blocks, narrow)
                    check_schedule(units, rows, n_tiles, clusters, narrow)


@pytest.mark.parametrize("n_tiles", [1, 2, 5, 20, 107])
@pytest.mark.parametrize("rows", SCHEDULED_ROWS, ids=str)
def test_odd_units_follow_the_pairs_of_their_columns(
    library: ctypes.CDLL, rows: tuple[int, ...], n_tiles: int
) -> None:
    units = schedule(library, rows, n_tiles, 1)  # one cluster takes the list as it is
    any_pairs = any(r > TILE_ROWS for r in rows)
    run = 0
    for i, unit in enumerate(units):
        run = run + 1 if unit[0].odd else 0
        if not run:
            continue
        assert not any_pairs or run <= len(rows), "odd units come in a heap"
        group, row = unit[0].group, unit[0].row
        pairs = (row - bounds_of(rows)[group]) // (2 * TILE_ROWS)
        if pairs == 0:
            continue
        last_band = pairs - (pairs - 1) // BAND * BAND
        columns = {t.column for t in unit if t.column < n_tiles * TILE_COLUMNS}
        before = units[i - run + 1 - last_band * len(columns) : i - run + 1]
        found = {(other[0].group, other[0].row, other[0].column) for other in before if not other[0].odd}
        starts = range(row - 2 * TILE_ROWS * last_band, row, 2 * TILE_ROWS)
        assert found == {(group, start, column) for start in starts for column in columns}


def longest(units: list[list[bool]]) -> float:
    """What the busiest cluster has to do; True: an odd unit."""
    return max(sum(ODD_COST if odd else 1.0 for odd in cluster) for cluster in units)


@pytest.mark.parametrize("n_tiles", [20, 28, 80, 107])
@pytest.mark.parametrize("rows", [(4110,), (3630, 80, 400), (3600, 200, 300), (65806,)], ids=str)
def test_the_last_round_is_as_cheap_as_with_odd_units_last(
    library: ctypes.CDLL, rows: tuple[int, ...], n_tiles: int
) -> None:
    units = schedule(library, rows, n_tiles, CLUSTERS)
    ours: list[list[bool]] = [[] for _ in range(CLUSTERS)]
    for unit in units:
        ours[unit[0].cluster].append(bool(unit[0].odd))
    odd = sum(unit[0].odd for unit in units)
    last = [False] * (len(units) - odd) + [True] * odd
    assert longest(ours) <= longest([last[c::CLUSTERS] for c in range(CLUSTERS)]) + 1e-9
    # Their weights were read in the same round or the one before.
    read: dict[tuple[int, int], int] = {}
    for unit in units:
        if not unit[0].odd:
            read[unit[0].group, unit[0].column] = unit[0].round
    for unit in units:
        key = (unit[0].group, unit[0].column)
        if unit[0].odd and key in read:
            assert 0 <= unit[0].round - read[key] <= 1


def test_rounds_of_the_longest_cluster(library: ctypes.CDLL) -> None:
    def rounds(rows: tuple[int, ...], n_tiles: int) -> float:
        units = schedule(library, rows, n_tiles, CLUSTERS)
        return longest([[bool(u[0].odd) for u in units if u[0].cluster == c] for c in range(CLUSTERS)])

    assert len(schedule(library, (4110,), 20, CLUSTERS)) == 5 * CLUSTERS
    assert rounds((4110,), 20) == 5
    assert rounds((4110,), 107) == pytest.approx(26.65)
    assert rounds((3630, 80, 400), 20) == pytest.approx(5.65)


# --- planted bugs ---------------------------------------------------------------------------------------------


class GemmBf16Params(ctypes.Structure):
    """As in api.h, with the fields of its GemmParams first."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("lda", ctypes.c_int64),
        ("w", ctypes.c_void_p),
        ("ldw", ctypes.c_int64),
        ("m", ctypes.c_int),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("groups", ctypes.c_int),
        ("modality_offsets", ctypes.c_void_p),
        ("num_sms", ctypes.c_int),
        ("d", ctypes.c_void_p),
        ("ldd", ctypes.c_int64),
    )


def params_of(p: Problem, d: torch.Tensor) -> GemmBf16Params:
    a, w = p.tensors["a"], p.tensors["w"]
    return GemmBf16Params(
        *(a.data_ptr(), a.stride(0), w.data_ptr(), w.stride(0), p.capacity, p.n, p.k, p.groups),
        *(p.tensors["offsets"].data_ptr(), p.num_sms, d.data_ptr(), d.stride(0)),
    )


def run_broken(
    library: ctypes.CDLL, bug: str, wide: bool, p: Problem, seed: int
) -> dict[str, torch.Tensor] | str:
    """The output, or the simulator's message."""
    bugs = ("none", "no full wait", "early release", "no peer release", "no drain", "stores beyond end")
    out = outputs_of(p)
    params = params_of(p, out["d"])
    error = ctypes.create_string_buffer(TEXT)
    arguments = (bugs.index(bug), int(wide), ctypes.byref(params), ctypes.c_uint64(seed), error)
    return error.value.decode() if library.sim_broken_gemm(*arguments) else out


@pytest.mark.parametrize("wide", [True, False])
def test_nothing_is_found_without_a_bug(library: ctypes.CDLL, wide: bool) -> None:
    for seed in range(16):
        problem = make_problem("gemm", (130, 70, 33), 520, n=520, num_sms=2)
        out = run_broken(library, "none", wide, problem, seed)
        assert isinstance(out, dict), out
        check(problem, out)


# Its consequences: the first is the mistake itself.
EARLY_RELEASE = ("early overwrite", "read before arrival", "phase overrun", "deadlock")


@pytest.mark.parametrize(
    ("bug", "wide", "kinds"),
    [
        ("no full wait", True, ("read before arrival", "un-waited work", "phase overrun")),
        ("no full wait", False, ("read before arrival", "un-waited work", "phase overrun")),
        ("early release", True, EARLY_RELEASE),
        ("early release", False, EARLY_RELEASE),
        ("no peer release", True, ("deadlock", "early overwrite")),
        ("no drain", True, ("block ended",)),
    ],
)
def test_planted_bug_is_found(library: ctypes.CDLL, bug: str, wide: bool, kinds: tuple[str, ...]) -> None:
    problem = make_problem("gemm", (300,), 520, n=520, num_sms=2)
    found = [run_broken(library, bug, wide, problem, seed) for seed in range(16)]
    messages = [message for message in found if isinstance(message, str)]
    assert any(message.startswith(kinds[0]) for message in messages)
    for message in messages:
        assert message.startswith(kinds), message
        assert "kernel gemm" in message


def test_stores_beyond_a_range_are_found(library: ctypes.CDLL) -> None:
    problem = make_problem("gemm", (130, 0, 0), 72, n=264, num_sms=2, spare=128)
    problem.tensors["a"][problem.live :] = 1  # else what is stored there would be NaN, as what was there
    out = run_broken(library, "stores beyond end", True, problem, 0)
    assert isinstance(out, dict), out
    with pytest.raises(AssertionError, match="rows beyond the ranges were written"):
        check(problem, out)
