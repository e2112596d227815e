"""The choice of tiles, and bugs planted in the matrix product, which the simulator must find."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

import test_gemm_gpu
from gemm_cases import KINDS, ROWS_AND_K, Problem, aligned, check, edge_case, make_problem, outputs_of
from sim_library import TEXT, build_library

WIDE, SQUARE = "128x256, pairs", "128x128"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_library("gemm", tmp_path_factory.mktemp("gemm_library"))


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
    bugs = ("none", "no full wait", "early release", "no peer release", "stores beyond end")
    out = outputs_of(p)
    params = params_of(p, out["d"])
    error = ctypes.create_string_buffer(TEXT)
    arguments = (bugs.index(bug), int(wide), ctypes.byref(params), ctypes.c_uint64(seed), error)
    return error.value.decode() if library.sim_broken_gemm(*arguments) else out


def test_the_mainloop_takes_8_bit_operands(library: ctypes.CDLL) -> None:
    for seed in range(8):
        p = make_problem("gemm", (130, 0, 70), 208, n=264, num_sms=2, seed=seed)
        narrow = {}
        for name in ("a", "w"):
            values = p.tensors[name].float().nan_to_num(0).to(torch.float8_e4m3fn)
            narrow[name] = aligned(
                values.shape[0], (values.shape[1] + 15) // 16 * 16, dtype=torch.float8_e4m3fn
            )
            narrow[name][:, : values.shape[1]] = values
            p.tensors[name] = values.bfloat16()  # the numbers that `check` multiplies
        out = outputs_of(p)
        error = ctypes.create_string_buffer(TEXT)
        q = replace(p, tensors={**p.tensors, **narrow})
        params = params_of(q, out["d"])
        failed = library.sim_e4m3_gemm(ctypes.byref(params), ctypes.c_uint64(seed), error)
        assert not failed, error.value.decode()
        check(p, out)


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
