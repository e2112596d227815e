"""Gated attention in the simulator: both forms and both tiles against float64 under many schedules; planted bugs."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_cases import FULL, WINDOW, Problem, check, expected, run, visible
from magihuman_fast.kernels import attention, ops
from magihuman_fast.kernels.attention import TILES
from sim_library import CSRC, TEXT

CASES = [pytest.param(case, id=f"full: {name}") for name, case in FULL.items()]
CASES += [pytest.param(case, id=f"window: {name}") for name, case in WINDOW.items()]
SCHEDULES = {"128x176, pairs": 50, "128x176": 16, "128x128": 16}
PAIRS = TILES[0]
BUGS = (
    "none",
    "no key wait",
    "no value wait",
    "no query wait",
    "no peer release",
    "no drain",
    "early release",
    "early queries",
    "early weights",
    "no mask",
)


class GatedAttentionParams(ctypes.Structure):
    """As in api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "gate", "out")),
        *((name, ctypes.c_int) for name in ("m", "num_q_heads", "num_kv_heads")),
        ("modality_offsets", ctypes.c_void_p),
        ("tokens_per_frame", ctypes.c_int),
        ("frame_window", ctypes.c_int),
        ("text_queries", ctypes.c_bool),
        ("num_sms", ctypes.c_int),
        ("tile", ctypes.c_int),
    )


def run_tile(
    attention_library: ctypes.CDLL,
    p: Problem,
    *,
    tile: str = PAIRS,
    seed: int,
    bug: str = "none",
    out: torch.Tensor | None = None,
) -> torch.Tensor | str:
    """The output of one tile, with a bug planted in it, or the simulator's message."""
    out = torch.full_like(p.tensors["q"], torch.nan) if out is None else out
    t = p.tensors
    params = GatedAttentionParams(
        *(tensor.data_ptr() for tensor in (*p.inputs, out)),
        *(len(out), *p.heads, t["modality_offsets"].data_ptr()),
        *(p.window or (0, 0)),
        *(p.text_queries, p.num_sms, TILES.index(tile)),
    )
    error = ctypes.create_string_buffer(TEXT)
    arguments = (BUGS.index(bug), ctypes.byref(params), ctypes.c_uint64(seed), error)
    return error.value.decode() if attention_library.sim_broken_attention(*arguments) else out


@pytest.mark.parametrize("tile", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_against_float64(attention_library: ctypes.CDLL, case: dict[str, Any], tile: str) -> None:
    problem = Problem(**case)
    first = None
    for seed in range(SCHEDULES[tile]):
        out = run_tile(attention_library, problem, tile=tile, seed=seed)
        assert isinstance(out, torch.Tensor), out
        if first is None:
            first = out
            check(problem, out)
        assert torch.equal(out.nan_to_num(12345), first.nan_to_num(12345)), "depends on the schedule"


@pytest.mark.parametrize("case", CASES)
def test_operation(case: dict[str, Any]) -> None:
    problem = Problem(**case)
    for backend in ("sim", "sdpa"):
        check(problem, run(problem, backend))


def test_every_tile_is_compiled_and_named() -> None:
    header = (CSRC / "attention" / "tile_config.h").read_text()
    assert tuple(re.findall(r'\{"([^"]+)", \d+', header))[: len(TILES)] == TILES
    assert f"kCompiledAttentionTiles = {len(TILES)};" in header
    problem = Problem((300, 3, 4), heads=(2, 1))
    for tile in TILES:
        check(problem, run(problem, tile=tile))
    with pytest.raises(ValueError, match=r"gated_attention: tile: expected one of .* or None, got 'big'"):
        run(problem, tile="big")


def test_pairs_need_two_multiprocessors() -> None:
    problem = Problem((300, 3, 4), num_sms=1)
    check(problem, run(problem))  # another tile is chosen
    with pytest.raises(ValueError, match="gated_attention: num_sms: expected at least 2 for pairs, got 1"):
        run(problem, tile=PAIRS)


@pytest.mark.parametrize("scale", [15.0, 48.0])
@pytest.mark.parametrize("window", [None, (100, 1)])
def test_extreme_logits(attention_library: ctypes.CDLL, scale: float, window: tuple[int, int] | None) -> None:
    problem = Problem((300, 4, 30), window=window, scale=scale)
    rows = torch.arange(problem.live)
    q, k = (problem.tensors[name][: problem.live, 0].double() for name in "qk")
    largest = (q @ k.T).abs().max() / 128**0.5
    assert largest > 4.5 * scale**2, "the logits are meant to be extreme: over 1000, and over 10000"
    for tile in TILES:
        out = run_tile(attention_library, problem, tile=tile, seed=3)
        assert isinstance(out, torch.Tensor), out
        assert out[rows].isfinite().all()
        check(problem, out)


@pytest.mark.parametrize(
    ("offsets", "fits"),
    [
        ((0, 150, 150, 150), (0, 130, 130, 130)),
        ((0, 100, 150, 150), (0, 100, 130, 130)),
        ((0, 120, 90, 110), (0, 90, 90, 110)),
        ((0, -5, -3, 130), (0, 0, 0, 130)),
        ((0, 100, 110, -1), (0, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("text_queries", [True, False])
def test_offsets_that_do_not_fit_are_cut(
    attention_library: ctypes.CDLL, offsets: tuple[int, ...], fits: tuple[int, ...], text_queries: bool
) -> None:
    # In device memory nobody looks at them. Registered buffers end where they end: beyond is an error.
    problem = Problem((130, 0, 0), window=(50, 0), spare=0, text_queries=text_queries)
    outs = []
    for values in (offsets, fits):
        problem.tensors["modality_offsets"] = torch.tensor(values, dtype=torch.int32)
        for name, tensor in problem.tensors.items():
            attention_library.sim_register(
                ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes), name.encode()
            )
        out = torch.full_like(problem.tensors["q"], torch.nan)
        attention_library.sim_register(ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(out.nbytes), b"out")
        try:
            got = run_tile(attention_library, problem, seed=0, out=out)
        finally:
            attention_library.sim_clear()
        assert isinstance(got, torch.Tensor), got
        outs.append(got.nan_to_num(12345))
    assert torch.equal(*outs)


def test_signs_and_equal_logits() -> None:
    # All scores equal: the mean of the values. All scores very negative: nothing underflows to 0 / 0.
    for value in (0.0, 100.0, -100.0):
        problem = Problem((150, 3, 4))
        problem.tensors["q"][: problem.live] = 100.0
        problem.tensors["k"][: problem.live] = value
        out = run(problem)
        mean = problem.tensors["v"][: problem.live].double().mean(0)
        gate = torch.sigmoid(problem.tensors["gate"][: problem.live].double()).unsqueeze(-1)
        assert ((out[: problem.live].double() - mean * gate).abs() <= 2.0**-8 * mean.abs().max()).all()


def test_nan_stays_in_its_row_and_head() -> None:
    problem = Problem((200, 3, 4), heads=(4, 2))
    problem.tensors["q"][40, 1] = torch.nan
    problem.tensors["v"][7, 1] = torch.nan
    out = run(problem)[: problem.live]
    assert out[40, 1].isnan().all()
    assert out[:, 2:].isnan().all()
    out[40, 1] = 0
    assert out[:, :2].isfinite().all()


def test_grid_of_any_size() -> None:
    problem = Problem((260, 3, 4), heads=(5, 1))
    outs = []
    for num_sms in (1, 2, 3, 7, 100):
        problem.num_sms = num_sms
        outs.append(run(problem, seed=num_sms, tile=None if num_sms < 2 else TILES[0])[: problem.live])
    check(problem, torch.nn.functional.pad(outs[1], (0, 0, 0, 0, 0, problem.spare), value=torch.nan))
    assert all(torch.equal(out, outs[1]) for out in outs[1:])


def test_without_offsets_all_rows_are_used() -> None:
    problem = Problem((130, 0, 0), spare=0)
    out = torch.full_like(problem.tensors["q"], torch.nan)
    ops.gated_attention(*problem.inputs, out=out, backend="sim", num_sms=1)
    check(problem, out)


def test_the_check_can_fail() -> None:
    problem = Problem((150, 8, 20), window=(50, 1), heads=(2, 1))
    good = run(problem)
    check(problem, good)
    wrongs = {
        "missing": (0, 0, 5, torch.nan),
        "rows that are not computed": (problem.live, 0, 0, 0.0),
        "one row": (177, 1, slice(None), good[177, 1] * 1.02),
        "one row is": (3, 0, 9, good[3, 0, 9] + good[3, 0].square().mean().sqrt() / 4),
    }
    for message, (row, head, columns, value) in wrongs.items():
        out = good.clone()
        out[row, head, columns] = value
        with pytest.raises(AssertionError, match=message):
            check(problem, out)
    with pytest.raises(AssertionError, match="over twice"):
        check(problem, good * 1.01)
    # A window that is one frame too narrow, or too wide.
    for radius in (0, 2):
        with pytest.raises(AssertionError, match="over twice"):
            check(problem, run(Problem((150, 8, 20), window=(50, radius), heads=(2, 1))))


def test_truth_is_the_reference_rule() -> None:
    # The reference's windows are written as ranges, the rule here as one comparison.
    problem = Problem((120, 5, 6), window=(20, 2))
    rows = torch.arange(problem.live)
    assert (run(problem, "reference")[rows].double() - expected(problem, rows)).abs().max() < 0.02
    assert visible(problem, rows).sum() < problem.live**2


def test_nothing_is_found_without_a_bug_and_much_work(attention_library: ctypes.CDLL) -> None:
    problem = Problem((700, 10, 40), heads=(4, 2), window=(100, 1), num_sms=4)
    for seed in range(16):
        out = run_tile(attention_library, problem, seed=seed)
        assert isinstance(out, torch.Tensor), out
        if seed == 0:
            check(problem, out)


@pytest.mark.parametrize(
    ("bug", "kinds"),
    [
        ("no key wait", ("read before arrival", "un-waited work", "phase overrun")),
        ("no value wait", ("read before arrival", "un-waited work", "phase overrun")),
        ("no query wait", ("read before arrival", "un-waited work", "phase overrun")),
        # Its consequences too: the first is the mistake itself.
        ("no peer release", ("deadlock", "early overwrite")),
        ("no drain", ("block ended",)),
        ("early release", ("early overwrite", "read before arrival", "phase overrun", "deadlock")),
        ("early queries", ("early overwrite", "read before arrival", "phase overrun", "deadlock")),
        ("early weights", ("register use in flight",)),
    ],
)
def test_planted_bug_is_found(attention_library: ctypes.CDLL, bug: str, kinds: tuple[str, ...]) -> None:
    problem = Problem((700, 10, 40), heads=(2, 1), num_sms=2)
    found = [run_tile(attention_library, problem, seed=seed, bug=bug) for seed in range(16)]
    messages = [message for message in found if isinstance(message, str)]
    assert any(message.startswith(kinds[0]) for message in messages)
    for message in messages:
        assert message.startswith(kinds), message
        assert "kernel gated_attention" in message


@pytest.mark.parametrize("case", [{"rows": (190, 0, 0)}, {"rows": (300, 9, 14), "window": (100, 0)}])
def test_missing_mask_is_found(attention_library: ctypes.CDLL, case: dict[str, Any]) -> None:
    problem = Problem(**case)
    out = run_tile(attention_library, problem, seed=0, bug="no mask")
    assert isinstance(out, torch.Tensor), out
    with pytest.raises(AssertionError, match="over twice"):
        check(problem, out)


def test_flash_attn_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((30, 3, 4), heads=(4, 2), window=(10, 1))
    missing = {"flash_attn_interface": None, "flash_attn": None}
    for name, module in missing.items():
        monkeypatch.setitem(__import__("sys").modules, name, module)
    with pytest.raises(RuntimeError, match="backend 'flash_attn': the package flash-attn is not installed"):
        run(problem, "flash_attn")

    def half_installed(name: str) -> object:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr(attention, "import_module", half_installed)
    with pytest.raises(ModuleNotFoundError, match="einops"):
        run(problem, "flash_attn")
    monkeypatch.undo()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As the package's function takes and gives it: (batch, rows, heads, 128)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return o.transpose(1, 2), None

    monkeypatch.setitem(__import__("sys").modules, "flash_attn", SimpleNamespace(flash_attn_func=attend))
    check(problem, run(problem, "flash_attn"))
