"""Every kernel and its baselines at the model's shapes: `pytest bench --benchmark-only`.

On a Hopper GPU with the kernels compiled all cases run, timed by CUDA events. Elsewhere the plain PyTorch form of each
operation runs on the CPU with a handful of rows at full width ("reduced rows"): it shows that everything runs, and
says nothing about a GPU. For numbers to keep there is `gpu_check.py`: it replays graphs, so that the host's launches
cost nothing, and measures the device's ceilings in the same run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from baseline_cases import padding_cases
from decoder_cases import decode_window_cases, decoder_layer_cases
from gated_attention_cases import attention_cases, window_attention_cases
from kernel_cases import (
    REDUCED,
    Case,
    Setting,
    Variant,
    fused_cases,
    gemm_cases,
    gpu_setting,
    pointwise_cases,
)
from magihuman_fast.kernels import ops
from timing import LAP_SECONDS, MAX_CALLS, DeviceTimer, cache_bytes, num_copies
from workload import CLIPS

GPU = ops.gpu_unavailable() is None
ROUNDS = 20 if GPU else 3
TIMER = DeviceTimer() if GPU else time.perf_counter


def cases() -> Iterator[tuple[Setting, Case]]:
    """Everything on a GPU. On a CPU only what is quick to prepare: most layers have one expert, not three."""
    for s in [gpu_setting(size) for size in CLIPS] if GPU else [REDUCED]:
        for build in (gemm_cases, fused_cases, attention_cases, pointwise_cases):
            for case in build(s):
                if GPU or "3 experts" not in case.shape or case.op in ("gemm_gelu7", "rms_norm"):
                    yield s, case
        baselines = [padding_cases, decoder_layer_cases, decode_window_cases] if GPU else []
        if s.clip.name == "1080p":
            baselines.append(window_attention_cases)
        for build in baselines:
            yield from ((s, case) for case in build(s))


def parameters() -> Iterator[object]:
    for s, case in cases():
        for variant in case.variants if GPU else case.variants[:1]:
            yield pytest.param(s, case, variant, id=f"{case.op}, {variant.name} ({case.shape})")


@pytest.mark.benchmark(timer=TIMER, warmup=False)
@pytest.mark.parametrize(("setting", "case", "variant"), list(parameters()))
def test_kernel(benchmark: BenchmarkFixture, setting: Setting, case: Case, variant: Variant) -> None:
    """Seconds a call, inputs rotated past the L2 cache."""
    touched = case.nbytes if case.footprint is None else case.footprint
    with torch.no_grad():
        calls = [variant.make() for _ in range(num_copies(touched, cache_bytes(setting.device)))]
        for call in calls:
            call()
        turns = itertools.cycle(calls)
        iterations = 1
        if GPU:
            start = TIMER()
            for call in calls:
                call()
            seconds = (TIMER() - start) / len(calls)
            iterations = max(1, min(int(LAP_SECONDS / max(seconds, 1e-6)), MAX_CALLS))
        benchmark.pedantic(lambda: next(turns)(), rounds=ROUNDS, iterations=iterations, warmup_rounds=1)
    benchmark.group = f"{case.op} ({case.shape})"
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.nbytes, "device": setting.device}
