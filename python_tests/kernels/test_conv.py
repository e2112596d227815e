"""The convolutions in the simulator: every form and ending against float64, under many schedules.

A schedule is one seed of the simulator. Each form meets at least SCHEDULES of them with each ending and each tile.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backends import BACKENDS, GRIDS, device_of, runs
from conv_cases import (
    ALL_SIZES,
    ENDINGS,
    EPS,
    FORMS,
    PLAIN_EPS,
    SIZES,
    TILE_CASES,
    Problem,
    activated,
    check,
    check_values,
    convolved,
    edge_case,
    expected,
    make_problem,
    run,
    sizes_on_all,
    unit_rms,
)
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.conv_weights import pack_conv, pack_time, pack_upsample
from mismatch import Mismatch, require, require_close, require_equal

SCHEDULES = 50  # for each form and ending
CASES = [(kind, ending) for kind in FORMS for ending in ENDINGS]


def tiles_of(kind: str) -> list[str]:
    return [tile for form, ending, tile in TILE_CASES if (form, ending) == (kind, "raw")]


@pytest.mark.parametrize(("kind", "ending"), CASES)
def test_against_float64(kind: str, ending: str) -> None:
    problems = [edge_case(kind, ending, tile, i) for tile in tiles_of(kind) for i in range(len(SIZES))]
    count = -(-SCHEDULES // len(problems))
    for index, problem in enumerate(problems):
        first: dict[str, torch.Tensor] = {}
        for seed in range(index * count, (index + 1) * count):
            out = run(problem, seed=seed)
            if not first:
                first = out
                check(problem, out)
            for name, tensor in out.items():
                same = torch.equal(tensor.nan_to_num(12345), first[name].nan_to_num(12345))
                assert same, f"{name} depends on the schedule"


def check_sizes(problems: dict[int, Problem], backend: ops.Backend) -> None:
    """Every size, whatever became of the others: which of them fail tells of what they have in common."""
    failed: dict[int, Mismatch] = {}
    for index, problem in problems.items():
        try:
            check(problem, run(problem, backend))
        except Mismatch as mismatch:
            failed[index] = mismatch
    if failed:
        first = failed[min(failed)]
        first.report["sizes"] = {
            str(ALL_SIZES[index]): str(failed.get(index, "holds")).splitlines()[0] for index in problems
        }
        raise first


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", FORMS)
def test_all_backends_agree_with_float64(kind: str, ending: str, backend: ops.Backend) -> None:
    for tile in tiles_of(kind):
        check_sizes({i: edge_case(kind, ending, tile, i) for i in (3, 4, 5)}, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", ["few", "all"])
@pytest.mark.parametrize(("kind", "ending", "tile"), TILE_CASES)
def test_every_tile_on_a_gpu(kind: str, ending: str, tile: str, grid: str) -> None:
    few = grid == "few"
    options: dict[str, Any] = {"device": "cuda", "num_sms": None if few else 0}
    sizes = range(len(SIZES)) if few else sizes_on_all(tile)
    check_sizes({index: edge_case(kind, ending, tile, index, **options) for index in sizes}, "gpu")


def test_several_tiles_of_channels_and_one_block_for_all() -> None:
    # Without a norm, 512 channels are two tiles of a pair, or four square ones; more units than blocks.
    for num_sms in (1, 2, 6):
        for kind in ("conv_3x3", "conv_upsample", "conv_time"):
            problem = make_problem(kind, "raw", (2, 20, 9), 24, 512, num_sms=num_sms)
            check(problem, run(problem, seed=num_sms))


def picture_arguments(size: tuple[int, int, int], channels: int, device: str, gain: float = 1.0) -> Problem:
    p = make_problem("conv_3x3", "raw", size, channels, 12, gain=gain, device=device)
    p.tensors["bias"] *= 0.25
    return p


@pytest.mark.parametrize(("backend", "num_sms"), GRIDS)
@pytest.mark.parametrize(
    ("size", "channels", "first", "count"),
    [((1, 1, 1), 8, 0, 1), ((2, 9, 17), 72, 0, 2), ((4, 7, 5), 64, 1, 2), ((3, 16, 8), 16, 2, 1)],
)
def test_picture(
    size: tuple[int, int, int], channels: int, first: int, count: int, backend: ops.Backend, num_sms: int
) -> None:
    device = device_of(backend)
    p = picture_arguments(size, channels, device)
    p.first, p.count = first, count
    for seed in runs(backend, 13):
        t, h, w = count, 2 * size[1], 2 * size[2]
        options: dict[str, Any] = {"first": first, "num_sms": num_sms, "backend": backend}
        arguments = (p.tensors["x"], p.tensors["w"], p.tensors["bias"])
        picture = torch.full((3, t, h, w), torch.nan, device=device)
        ops.conv_picture(*arguments, picture, **options)
        frames = torch.full((t + 1, h, w, 3), 77, dtype=torch.uint8, device=device)
        ops.conv_picture(*arguments, frames[:t], **options)
        # The frames are exactly those of the picture: clamped, then truncated.
        levels = ((picture * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 3, 0)
        says = "are not those of the picture"
        require_equal("frames", frames[:t], levels, layout="pixels", says=says)
        require_equal("frames:", frames[t:], 77, layout="pixels", says="other frames were written")
        if seed > 0:
            continue
        found = set(levels.unique().tolist())
        require({0, 255} <= found or levels.numel() < 100, "the clamp is not reached", levels=len(found))
        truth, baseline = (
            as_picture(convolved(p, dtype).bfloat16().float()) for dtype in (torch.float64, torch.float32)
        )
        pixels = (x.permute(1, 2, 3, 0) for x in (picture, truth.double(), baseline))
        check_values("picture", *pixels)


def as_picture(y: torch.Tensor) -> torch.Tensor:
    """(n, H, W, 12) to (3, n, 2 H, 2 W), index by index."""
    n, h, w, _ = y.shape
    out = torch.full((3, n, 2 * h, 2 * w), torch.nan, dtype=y.dtype, device=y.device)
    for rgb in range(3):
        for pw in range(2):
            for ph in range(2):
                out[rgb, :, ph::2, pw::2] = y[..., rgb * 4 + pw * 2 + ph]
    return out


@pytest.mark.parametrize(("backend", "num_sms"), GRIDS)
@pytest.mark.parametrize("channels", [8, 72, 512])
def test_channel_norm(channels: int, backend: ops.Backend, num_sms: int) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(channels)
    x = (torch.randn(3, 5, 7, channels, generator=generator) * 3).bfloat16().to(device)
    for seed in runs(backend, 17):
        activation = ("none", "silu", "relu")[seed % 3]
        plain = torch.full_like(x[:2], torch.nan)  # a ring of two frames
        normed = torch.full_like(x, torch.nan)
        options: dict[str, Any] = {"first": 1, "activation": activation, "backend": backend}
        ops.channel_norm(x, normed, eps=EPS, plain=plain, num_sms=num_sms, **options)
        pixels: dict[str, Any] = {"layout": "pixels"}
        says = "other frames were written"
        require_equal("normed:", normed[:1], torch.nan, says=says, **pixels)
        (truth, baseline) = (
            (activated(unit_rms(v, EPS).bfloat16().to(v.dtype), activation), unit_rms(v, PLAIN_EPS))
            for v in (x[1:].double(), x[1:].float())
        )
        for name, got, ref, base in zip(
            ("normed", "plain"), (normed[1:], plain[[1, 0]]), truth, baseline, strict=True
        ):
            check_values(name, got, ref, base.bfloat16())
        in_place = x.clone()
        ops.channel_norm(in_place, in_place, num_sms=num_sms and 1, **options)
        require_equal("in place", in_place[1:], normed[1:], says="differs from elsewhere", **pixels)
        require_equal("in place:", in_place[:1], x[:1], says=says, **pixels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_latent_pixels(backend: ops.Backend) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(5)
    latent = torch.randn(48, 4, 3, 5, generator=generator).to(device)
    mean, std = (torch.rand(48, generator=generator).to(device) + 0.5 for _ in range(2))
    # Frames 2, 3 of the clip, then three copies of the last.
    wanted = latent.double()[:, [2, 3, 3, 3, 3]] * std.double().view(-1, 1, 1, 1)
    wanted = (wanted + mean.double().view(-1, 1, 1, 1)).permute(1, 2, 3, 0)
    for _ in runs(backend, 50):
        out = torch.full((6, 3, 5, 48), torch.nan, dtype=torch.bfloat16, device=device)
        ops.latent_pixels(latent, mean, std, out[:5], first=2, num_sms=1, backend=backend)
        bound = (2.0**-8 + 1e-6) * wanted.abs() + 1e-6
        require_close("latent_pixels", out[:5], wanted, bound, layout="pixels")
        require_equal("latent_pixels:", out[5:], torch.nan, layout="pixels", says="other frames were written")


def test_packed_weights() -> None:
    weight = torch.randn(4, 3, 3, 2, 5)
    assert torch.equal(pack_conv(weight)[1, 2, 1, 4], weight[1, :, 2, 1, 4])
    time = torch.randn(8, 3, 3, 1, 1)
    assert torch.equal(pack_time(time)[1, 2, 0], time[6, :, 0, 0, 0])
    phases = pack_upsample(torch.ones(2, 3, 3, 3))
    assert phases.shape == (4, 2, 2, 2, 3)
    # How many of the nine taps fall on each pixel of the small picture.
    counts = [phase[0, :, :, 0].flatten().tolist() for phase in phases]
    assert counts == [[1, 2, 2, 4], [2, 1, 4, 2], [2, 4, 1, 2], [4, 2, 2, 1]]


@pytest.mark.parametrize(("backend", "num_sms"), GRIDS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 2), (8, 9)])
def test_four_phases_are_upsample_then_conv(
    height: int, width: int, backend: ops.Backend, num_sms: int
) -> None:
    """To rounding, borders included: the sums of weights are rounded to bf16 once, which is all that differs."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, height, width, 64, generator=generator).bfloat16().to(device)
    weight = (torch.randn(64, 64, 3, 3, generator=generator) / 24).bfloat16().to(device)
    bias = torch.randn(64, generator=generator).bfloat16().float().to(device)
    doubled = x.double().permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)

    def conv(frames: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(frames, w.to(frames.dtype), padding=1)

    wanted = (conv(doubled, weight) + bias.double().view(-1, 1, 1)).permute(0, 2, 3, 1)
    size = (conv(doubled.abs(), weight.abs()) + bias.double().abs().view(-1, 1, 1)).permute(0, 2, 3, 1)
    for _ in runs(backend, 5):
        out = ops.conv_upsample(x, pack_upsample(weight), bias, num_sms=num_sms, backend=backend).out
        assert out is not None
        # Half a unit of bf16 for each summed weight, and for the result.
        require_close("out", out, wanted, 2.0**-8 * (size + wanted.abs()) + 1e-6, layout="pixels")
    exact = (weight * 64).round() / 64  # whose sums are exact in bf16
    out = ops.conv_upsample(x, pack_upsample(exact), bias, num_sms=num_sms, backend=backend).out
    wanted = (conv(doubled, exact) + bias.double().view(-1, 1, 1)).permute(0, 2, 3, 1)
    assert out is not None
    require_close("out of exact sums", out, wanted, 2.0**-8 * wanted.abs() + 1e-5, layout="pixels")


def test_nan_and_infinity_stay_near_their_pixel() -> None:
    for value in (float("nan"), float("inf")):
        problem = make_problem("conv_3x3", "normed", (3, 9, 9), 16, 64)
        problem.tensors["x"][0, 4, 4, 3] = value
        out = run(problem)["normed"][:3]
        near = torch.zeros(3, 9, 9, dtype=torch.bool)
        near[:2, 3:6, 3:6] = True
        assert out[near].isnan().any(-1).all()
        assert out[~near].isfinite().all()


def test_the_check_can_fail() -> None:
    problem = make_problem("conv_3x3", "bare", (2, 9, 8), 16, 64)
    good = run(problem)
    check(problem, good)
    for at, value in (((0, 0, 0, 0), torch.nan), ((1, 8, 7, 63), 9.0), ((2, 0, 0, 0), 0.0)):
        out = {name: tensor.clone() for name, tensor in good.items()}
        out["normed"][at] = value
        with pytest.raises(AssertionError):
            check(problem, out)
    worse = {name: tensor * 1.01 for name, tensor in good.items()}
    with pytest.raises(AssertionError):
        check(problem, worse)
    assert set(expected(problem)) == {"out", "normed"}
