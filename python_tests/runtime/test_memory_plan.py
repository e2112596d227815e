"""Memory known beforehand: the published presets, where the text encoder goes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from magihuman_fast.checkpoints.loading import dit_bytes
from magihuman_fast.errors import InsufficientMemory
from magihuman_fast.model.config import SUPER_RESOLUTIONS, DiTConfig
from magihuman_fast.model.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig
from magihuman_fast.runtime.dit import ClipShape
from magihuman_fast.runtime.graph import GRAPH_BYTES, StepSpec
from magihuman_fast.runtime.memory_estimate import Model, bytes_text
from magihuman_fast.runtime.memory_plan import (
    MemoryPlan,
    ModelSizes,
    check_place,
    check_request,
    choose_place,
    device_capacity,
    memory_plan,
)
from magihuman_fast.runtime.turbo_vae import decode_bytes

GIB = 2**30
PUBLISHED = Model(DiTConfig(), dit_bytes(DiTConfig(), torch.bfloat16))
SIZES = ModelSizes(
    first=PUBLISHED,
    guided=False,
    super_resolution={"1080p": PUBLISHED},
    turbo_vae=TurboVAEConfig.from_dict(PUBLISHED_CONFIG),
    text_encoder_bytes=int(17.2 * GIB),
    other_bytes=1 * GIB,
    itemsize=2,
    kernels=True,
    kernel_decoder=True,
)


def plan_of(preset: str, place: str, sizes: ModelSizes = SIZES) -> MemoryPlan:
    return next(p for p in memory_plan(sizes) if (p.preset, p.text_encoder) == (preset, place))


def test_published_presets() -> None:
    assert 28.4 * GIB < PUBLISHED.weight_bytes < 28.6 * GIB
    first, large = plan_of("256p", "device"), plan_of("1080p", "cpu")
    assert first.size == (448, 256)
    assert large.size == (1920, 1088)
    assert first.weight_bytes == PUBLISHED.weight_bytes + SIZES.text_encoder_bytes + SIZES.other_bytes
    assert large.weight_bytes == 2 * PUBLISHED.weight_bytes + SIZES.other_bytes
    # Residual stream, normed input and inner activation of 66,046 rows, once, and latents; both stages' steps stay.
    rows = 32 * 34 * 60 + 126 + 640
    latents = large.step_bytes - first.step_bytes - rows * (6 * 5120 + 2 * 20480)
    assert 0 < latents < 0.35 * GIB
    assert large.step_bytes > plan_of("540p", "cpu").step_bytes > first.step_bytes
    on_disk = plan_of("256p", "disk")
    assert on_disk.needed_bytes == on_disk.weight_bytes + SIZES.text_encoder_bytes
    assert large.kept_bytes - large.needed_bytes == large.step_bytes  # the decode needs more than the steps
    # What the whole is for: both models, 1080p, everything on the device but the text encoder.
    assert large.needed_bytes < 78e9
    # The reference path keeps no step: it needs its largest stage's activations, which are larger.
    plain = plan_of("1080p", "cpu", replace(SIZES, kernels=False, kernel_decoder=False))
    assert plain.step_bytes > 2 * large.step_bytes
    assert plain.decode_bytes > 2 * large.decode_bytes
    assert plain.kept_bytes == plain.needed_bytes


def test_the_text_encoder_goes_where_there_is_room() -> None:
    plans = memory_plan(SIZES)
    assert choose_place(plans, "256p", None) == "device"
    assert choose_place(plans, "256p", plan_of("256p", "device").needed_bytes) == "device"
    assert choose_place(plans, "256p", plan_of("256p", "device").needed_bytes - 1) == "cpu"
    check_place(plans, "256p", "cpu", 40 * GIB)
    with pytest.raises(InsufficientMemory, match=r"1080p by where .* 60.0 GiB are free.*256p \(cpu\)"):
        choose_place(plans, "1080p", 60 * GIB)
    with pytest.raises(InsufficientMemory, match=r"10.0 GiB are free, in which would fit: none"):
        check_place(plans, "256p", "disk", 10 * GIB)


def request_of(seconds: float, size: tuple[int, int]) -> list[tuple[Model, StepSpec]]:
    audio = round(25 * seconds) + 1
    first, sr = ClipShape.of((448, 256), audio), ClipShape.of(size, audio)
    window = SUPER_RESOLUTIONS["1080p"].frame_window
    return [
        (PUBLISHED, StepSpec.first_stage(first, guided=False, steps=8)),
        (PUBLISHED, StepSpec.super_resolution(sr, guided=False, frame_window=window)),
    ]


def test_requests_are_refused_with_what_would_fit() -> None:
    weights = 2 * PUBLISHED.weight_bytes + GIB
    size = (1920, 1088)
    decode = decode_bytes(SIZES.turbo_vae, size, 32)
    steps = sum(spec.nbytes(model.config) + GRAPH_BYTES for model, spec in request_of(5, size))
    assert check_request(SIZES, request_of(5, size), weights, None, 5) == (steps, decode)
    assert check_request(SIZES, request_of(5, size), weights, weights + decode, 5) == (steps, decode)
    with pytest.raises(InsufficientMemory, match=r"size, seconds: 5 s of 1920x1088 need"):
        check_request(SIZES, request_of(5, size), weights, weights + decode - 1, 5)
    message = r"size, seconds: 60 s of 1920x1088 need .* are free; (\d+.\d) s would fit at this size"
    with pytest.raises(InsufficientMemory, match=message) as refused:
        check_request(SIZES, request_of(60, size), weights, weights + 30 * GIB, 60)
    longest = float(str(refused.value).split("; ")[1].split(" s ")[0])
    check_request(SIZES, request_of(longest, size), weights, weights + 30 * GIB, longest)
    with pytest.raises(InsufficientMemory):
        check_request(SIZES, request_of(longest + 0.2, size), weights, weights + 30 * GIB, longest + 0.2)
    with pytest.raises(InsufficientMemory, match=r"0 B are free; no length would fit at this size"):
        check_request(SIZES, request_of(2, size), weights, weights - 1, 2)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * GIB, "3.0 GiB"), (None, "unknown")],
)
def test_bytes_for_people(count: Any, text: str) -> None:
    assert bytes_text(count) == text


def test_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("magihuman_fast.runtime.memory_plan.available_memory", lambda: 100)
    assert device_capacity(cpu) == 100
    assert device_capacity(cpu, held=20) == 120
    assert device_capacity(cpu, 7) == 7
    assert device_capacity(cpu, 115, held=20) == 115
    monkeypatch.setattr("magihuman_fast.runtime.memory_plan.available_memory", lambda: None)
    assert device_capacity(cpu) is None
    assert device_capacity(cpu, 7) == 7
