"""The measuring tools without a GPU: arithmetic of timings, counts of work, every case at a toy size."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import test_attention_gpu
import test_gpu_kernels
import torch

import baseline_cases
import decoder_cases
import gated_attention_cases
import gpu_groups
import kernel_cases
import timing
import workload
from attention_cases import Problem
from attention_cases import check as check_attention
from attention_cases import run as run_attention
from gated_attention_cases import attention_cases, window_attention_cases
from kernel_cases import TINY, Case, Variant
from magihuman_fast.kernels import ops
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import windowed_layers
from timing import Ceilings, HostStopwatch, Result

BENCH = Path(timing.__file__).parent
MODEL = DiTConfig()
SR_1080P = dataclasses.replace(MODEL, local_attn_layers=windowed_layers(40))


# --- timing ---------------------------------------------------------------------------------------------------


class FakeClock:
    """A clock that only work moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_measure_takes_the_median_a_call_over_rotated_inputs() -> None:
    clock, order, costs = FakeClock(), [], iter([1.0] * 1000)

    def make() -> timing.Call:
        number = len(made)
        made.append(number)

        def call() -> None:
            order.append(number)
            clock.now += 1e-3 * next(costs)

        return call

    made: list[int] = []
    found = timing.measure(
        make, nbytes=40, cache=100, stopwatch=HostStopwatch(clock), laps=5, lap_seconds=0.013, max_seconds=9
    )
    # 100 bytes of other inputs pass before one of 40 comes again: three others. Three rotations fit into a lap.
    assert made == [0, 1, 2, 3]
    assert order[:8] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert (found.copies, found.calls, found.laps) == (4, 12, 5)
    assert found.seconds == pytest.approx(1e-3)
    assert found.clock == "perf_counter"


def test_measure_gives_median_and_quartiles() -> None:
    clock = FakeClock()
    # Warm-up, two for the estimate, one before the laps; then five laps in disorder.
    costs = iter([7.0, 7.0, 7.0, 7.0, 5.0, 1.0, 100.0, 3.0, 2.0])

    def call() -> None:
        clock.now += next(costs)

    found = timing.measure(
        lambda: call,
        nbytes=1,
        cache=0,
        stopwatch=HostStopwatch(clock),
        laps=5,
        lap_seconds=1,
        max_seconds=1e9,
    )
    assert (found.low, found.seconds, found.high) == (2.0, 3.0, 5.0)
    assert (found.copies, found.calls) == (1, 1)


def test_measure_stops_early_but_never_before_three_laps() -> None:
    clock = FakeClock()

    def call() -> None:
        clock.now += 10.0

    found = timing.measure(
        lambda: call, nbytes=1, cache=0, stopwatch=HostStopwatch(clock), laps=50, max_seconds=5
    )
    assert found.laps == 3


@pytest.mark.parametrize(
    ("nbytes", "cache", "copies"), [(10, 0, 1), (10, 100, 11), (100, 100, 2), (60, 100, 3), (10**9, 100, 2)]
)
def test_number_of_copies(nbytes: int, cache: int, copies: int) -> None:
    assert timing.num_copies(nbytes, cache) == copies


def test_ceiling_is_the_longer_of_arithmetic_and_bytes() -> None:
    ceilings = Ceilings(copy_bytes=4e12, bf16_flops=800e12, note="")
    assert ceilings.floor(800 * 10**9, 4 * 10**6) == pytest.approx(1e-3)
    assert ceilings.floor(800 * 10**6, 4 * 10**9) == pytest.approx(1e-3)


# --- counts of work -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("clip", "rows"), [("256p", 4110), ("540p", 16846), ("1080p", 65806)])
def test_tokens_of_a_clip(clip: str, rows: int) -> None:
    assert workload.CLIPS[clip].rows == rows
    assert workload.CLIPS[clip].offsets == (0, rows - 526, rows - 400, rows)


@pytest.mark.parametrize(
    ("clip", "linears", "attention"), [("256p", 89.7, 13.8), ("540p", 368, 233), ("1080p", 1436, 2402)]
)
def test_operations_of_a_step(clip: str, linears: float, attention: float) -> None:
    """In 10^12, counted by hand from the model's shapes; 1080p has 8 full layers and 32 within 11 frames."""
    tokens, windowed = workload.CLIPS[clip], clip == "1080p"
    config, window = (SR_1080P, workload.FRAME_WINDOW) if windowed else (MODEL, None)
    assert workload.linear_flops(config, tokens.rows) / 1e12 == pytest.approx(linears, rel=2e-3)
    found = workload.step_attention_flops(config, tokens, window) / 1e12
    assert found == pytest.approx(attention, rel=3e-3)


def test_linears_of_both_kinds_of_layer() -> None:
    gelu = [(7208, 5120), (5120, 5120), (20480, 5120), (5120, 20480)]
    swiglu = [(7208, 5120), (5120, 5120), (27304, 5120), (5120, 13652)]
    kinds = [workload.layer_linears(MODEL, layer) for layer in range(40)]
    assert kinds == [gelu] * 4 + [swiglu] * 36
    per_token = 4 * 2 * 5120 * (7208 + 5120 + 20480 + 20480) + 36 * 2 * 5120 * (7208 + 5120 + 27304 + 13652)
    assert workload.linear_flops(MODEL, 1) == per_token
    assert workload.padded(13652) == 13696


def test_pairs_within_a_frame_window() -> None:
    """By brute force, token by token."""
    clip = workload.Tokens("small", (6, 1, 2), 3, 2)
    frames = [token // 2 if token < 12 else None for token in range(17)]
    pairs = sum(f is None or g is None or abs(f - g) <= 2 for f in frames for g in frames)
    assert workload.attention_pairs(clip, 2) == pairs
    assert workload.attention_pairs(clip) == 17**2


def test_operations_and_bytes_of_cases() -> None:
    s = kernel_cases.gpu_setting("256p")
    cases = {case.shape: case for case in kernel_cases.gemm_cases(s)}
    shapes = ["4110 x 7168 x 5120", "4110 x 5120 x 5120", "4110 x 27304 x 5120", "4110 x 5120 x 13696"]
    assert list(cases) == [f"256p: {shape}" for shape in shapes]
    first = cases["256p: 4110 x 7168 x 5120"]
    assert first.flops == 2 * 4110 * 7168 * 5120
    assert first.nbytes == 2 * (4110 * 5120 + 7168 * 5120 + 4110 * 7168)
    fused = {(case.op, case.shape): case for case in kernel_cases.fused_cases(s)}
    residual = fused["gemm_residual", "256p: 4110 x 5120 x 13696, 3 experts"]
    assert residual.nbytes == 2 * (4110 * 13696 + 3 * 5120 * 13696) + 2 * 4 * 4110 * 5120
    qkv = fused["gemm_qkv", "256p: 4110 x 7208 x 5120"]
    assert qkv.nbytes == 2 * (4110 * 5120 + 7208 * 5120) + 4110 * (2 * 7168 + 4 * 40 + 4 * 96)
    swiglu = fused["gemm_swiglu7", "256p: 4110 x 27304 x 5120"]
    assert swiglu.nbytes == 2 * (4110 * 5120 + 27304 * 5120 + 4110 * 13696)
    count = 48 * 32 * 16 * 28
    assert kernel_cases.pointwise_cost("renoise_step", s) == (0, 16 * count)
    assert kernel_cases.pointwise_cost("clamp_image", s) == (0, 8 * count // 32)
    flops, nbytes = kernel_cases.pointwise_cost("embed", s)
    assert flops == 2 * 5120 * (3584 * 192 + 126 * 64)
    assert nbytes == 4 * (count + 126 * 64 + 5120 * (192 + 64) + 400 * 5120 + 4110 * 5120)


@pytest.mark.parametrize(("clip", "published"), [("256p", 65), ("540p", 298), ("1080p", 1191)])
def test_decode_window_operations(clip: str, published: float) -> None:
    """In 10^12: 9 of the 43 latent frames that a clip's windows decode, less what the upsamplers save."""
    found = decoder_cases.window_flops(kernel_cases.gpu_setting(clip)) / 1e12
    assert 0.95 * published * 9 / 43 <= found <= published * 9 / 43


def test_layers_of_a_decode_window() -> None:
    """Every layer of the published decoder is among the cases, and their sizes are the window's."""
    cases = list(decoder_cases.decoder_layer_cases(kernel_cases.gpu_setting("1080p")))
    shapes = {case.shape.split(": ")[1] for case in cases if case.op == "conv_3x3"}
    assert "128 -> 128 channels, 36 x 544 x 960, norm" in shapes
    assert "64 -> 64 channels, 36 x 544 x 960, shortcut, raw, norm" in shapes
    assert len({(case.op, case.shape) for case in cases}) == len(cases)
    sixty_four = next(c for c in cases if c.shape.endswith("64 -> 64 channels, 36 x 544 x 960, norm"))
    pixels = 36 * 544 * 960
    assert sixty_four.flops == 2 * 27 * 64 * 64 * pixels
    assert sixty_four.nbytes == 2 * 2 * 64 * pixels + 2 * 27 * 64 * 64


@pytest.mark.slow
def test_quality_of_the_decoder() -> None:
    found = decoder_cases.decoder_quality(dataclasses.replace(TINY, backend="sim"), 2)
    errors = [found[f"{name}: relative error"] for name in ("kernels", "PyTorch bf16")]
    assert 0 < errors[0] <= 2 * errors[1]
    assert all(found[f"{name}: PSNR"] > 30 for name in ("kernels", "PyTorch bf16"))


# --- cases and parts ------------------------------------------------------------------------------------------


def every_case() -> list[Case]:
    b, k = baseline_cases, kernel_cases
    builders = (k.gemm_cases, k.fused_cases, k.pointwise_cases, b.padding_cases, b.layer_cases)
    d = decoder_cases
    builders += (attention_cases, window_attention_cases, d.decoder_layer_cases)
    builders += (d.decode_window_cases, d.decode_clip_cases)
    return [case for build in builders for case in build(TINY)]


@pytest.mark.slow
def test_every_case_runs_and_a_failing_variant_stops_no_other() -> None:
    results: list[Result] = []
    errors: list[tuple[str, str]] = []

    def fail(op: str, shape: str, variant: str, error: Exception) -> None:
        errors.append((variant, str(error)))

    def broken() -> timing.Call:
        raise RuntimeError("no such library")

    cases = every_case()
    cases[0] = dataclasses.replace(
        cases[0], variants=(cases[0].variants[0], Variant("broken", broken), *cases[0].variants[1:])
    )
    ceilings = Ceilings(1e9, 1e9, "")
    quick = {"laps": 1, "lap_seconds": 0, "max_seconds": 0}
    for case in cases:
        kernel_cases.run_case(case, "cpu", ceilings, results.append, fail, **quick)
    assert errors == [("broken", "no such library")]
    assert len(results) == sum(len(case.variants) for case in cases) - 1
    assert {"gemm", "gemm_qkv", "gemm_gelu7", "gemm_swiglu7", "gemm_residual", "rms_norm"} <= {
        result.op for result in results if result.variant == "reference" and result.speedup is not None
    }
    steps = baseline_cases.extrapolated_step(results, TINY.clip.name)
    layers = [r.timing.seconds for r in results if r.op == "layer" and r.variant == "PyTorch"]
    assert steps[-1].timing.seconds == pytest.approx(4 * layers[0] + 32 * layers[1] + 4 * layers[2])
    assert all("extrapolated" in step.note for step in steps)


@pytest.mark.parametrize("op", ["gemm_residual", "gemm_gelu7", "gemm_swiglu7", "gemm_qkv"])
def test_compiled_baselines_compute_what_the_operation_does(op: str) -> None:
    n = TINY.config.qkvg_rows if op == "gemm_qkv" else 64
    inputs = kernel_cases.inputs_of(op, TINY, n, 256, 3)
    u = torch.empty(TINY.clip.rows, n, dtype=torch.bfloat16)
    kernel_cases.grouped_product(inputs["a"], inputs["w"], TINY.clip.offsets, u)
    given = test_gpu_kernels.fresh(inputs) | {"expert": kernel_cases.experts_of_rows(TINY, 3)}
    found = kernel_cases.EPILOGUES[op](u, given)
    expected = getattr(ops, op)(**inputs, backend="reference")
    if op == "gemm_qkv":
        pairs = [(got.reshape_as(ref), ref) for got, ref in zip(found, expected, strict=True)]
    else:
        pairs = [(found, expected[:, : found.shape[1]])]
    for got, ref in pairs:
        torch.testing.assert_close(got.float(), ref.float(), rtol=2**-7, atol=2**-7)


def test_attention_baselines_compute_what_the_operation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    make = gated_attention_cases.attention_inputs
    for build in (attention_cases, window_attention_cases):
        window = gated_attention_cases.window_of(TINY) if build is window_attention_cases else None
        given = make(TINY, window)
        monkeypatch.setattr(gated_attention_cases, "attention_inputs", lambda *arguments, given=given: given)
        (case,) = build(TINY)
        expected = case.variants[0].make()().clone()
        gated = [v for v in case.variants[1:] if v.name.endswith("+ compiled gate")]
        assert gated
        for variant in gated:
            torch.testing.assert_close(variant.make()(), expected, rtol=2**-6, atol=2**-7)


SMALL = dataclasses.replace(TINY, clip=gpu_groups.SMALL, backend="sim")
SMALL_PRODUCTS = [
    ("gemm", 512, 256, 1),
    ("gemm_qkv", SMALL.config.qkvg_rows, 256, 3),
    ("gemm_residual", 256, 704, 1),
    ("gemm_gelu7", 128, 256, 3),
    ("gemm_swiglu7", 1360, 256, 3),
]


@pytest.mark.parametrize(("op", "n", "k", "groups"), SMALL_PRODUCTS)
def test_gpu_checks_of_products_hold_in_the_simulator(op: str, n: int, k: int, groups: int) -> None:
    ops.simulator().set_multiprocessor_count(4)
    test_gpu_kernels.check_product(op, SMALL, n, k, groups)
    test_gpu_kernels.check_rows_left_alone(op, SMALL, n, k, groups)


@pytest.mark.parametrize("window", [False, True])
def test_gpu_checks_of_attention_hold_in_the_simulator(monkeypatch: pytest.MonkeyPatch, window: bool) -> None:
    monkeypatch.setattr(
        test_attention_gpu, "run", lambda p, backend: run_attention(p, "sim" if backend == "gpu" else backend)
    )
    problem = Problem(
        (12 * 36, 11, 20), heads=(5, 1), window=(36, 2) if window else None, text_queries=not window
    )
    test_attention_gpu.check_model(problem)
    rows = test_attention_gpu.sampled(problem)
    wrong = run_attention(problem, "sim")
    wrong[rows[5], 3] = wrong[rows[5], 2]
    with pytest.raises(AssertionError, match="over twice"):
        check_attention(problem, wrong, run_attention(problem, "sdpa"), rows)


def test_gpu_checks_of_pointwise_operations_hold_in_the_simulator() -> None:
    ops.simulator().set_multiprocessor_count(4)
    for groups in (1, 3):
        test_gpu_kernels.check_norm(SMALL, groups)
    test_gpu_kernels.check_embed(SMALL)
    test_gpu_kernels.check_head(SMALL)
    for op in kernel_cases.UPDATES:
        test_gpu_kernels.check_update(SMALL, op)


@pytest.mark.parametrize("row", [0, 150, 221])
def test_gpu_checks_notice_one_wrong_tile(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    right = ops.gemm

    def wrong(*args: Any, backend: ops.Backend, **kwargs: Any) -> torch.Tensor:
        out = right(*args, **kwargs, backend="reference")
        if backend == "sim":
            out[row : row + 8, 32:40] = out[row : row + 8, 40:48].clone()
        return out

    monkeypatch.setattr(ops, "gemm", wrong)
    with pytest.raises(AssertionError, match="differs from PyTorch"):
        test_gpu_kernels.check_product("gemm", SMALL, 64, 256, 1)
