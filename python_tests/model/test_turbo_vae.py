"""The Turbo VAE decoder against the golden vectors, its windows and its inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cases import GOLDEN, load_golden
from magihuman_fast.checkpoints.synthetic.turbo_vae import TINY_CONFIG
from magihuman_fast.errors import Cancelled, InputError
from magihuman_fast.model.turbo_vae import TurboVAE, Window, channel_rms, plan_windows, to_uint8
from numerics import rel_err
from turbo_vae_cases import golden_model, random_latent, tiny_state_dict

CASES = ["a_t1", "a_t3", "a_t7", "a_t16"]
# The golden vectors


@pytest.mark.parametrize("case", CASES)
def test_float32_matches_golden(case: str) -> None:
    golden = load_golden(f"turbo_vae/{case}")
    video = golden_model(golden).decode(golden.batch0("in.latent"))
    assert video.dtype == torch.float32
    assert rel_err(video, golden["out.video_fp32"][0]) <= 1e-5


@pytest.mark.parametrize("case", CASES)
def test_frames_match_golden(case: str) -> None:
    golden = load_golden(f"turbo_vae/{case}")
    frames = golden_model(golden).decode_frames(golden.batch0("in.latent"))
    expected = golden["out.frames_uint8"]
    assert frames.dtype == torch.uint8
    assert frames.shape == expected.shape
    off = (frames.int() - expected.int()).abs()
    assert int(off.max()) <= 1
    assert int(off.count_nonzero()) <= 1e-3 * off.numel()


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_error_is_bounded(case: str) -> None:
    golden = load_golden(f"turbo_vae/{case}")
    video = golden_model(golden, torch.bfloat16).decode(golden.batch0("in.latent"))
    assert video.dtype == torch.float32
    assert rel_err(video, golden["out.video_fp32"][0]) <= 1.25 * float(golden.meta["rel_err_bf16"])


# Windows


def window(*values: int) -> Window:
    return Window(*values)


def test_window_plan_of_a_five_second_clip() -> None:
    plan = plan_windows(32, 7, 7)
    assert [w.num_latent_frames for w in plan] == [8, 9, 9, 9, 8]
    assert [w.is_first for w in plan] == [True, False, False, False, False]
    assert plan == [
        window(0, 8, 0, 0, 25, 0, 25),
        window(6, 15, 0, 4, 32, 25, 53),
        window(13, 22, 0, 4, 32, 53, 81),
        window(20, 29, 0, 4, 32, 81, 109),
        window(27, 32, 3, 4, 20, 109, 125),
    ]


@pytest.mark.parametrize(
    ("num_latent_frames", "first_chunk", "step", "expected"),
    [
        (1, 7, 7, [window(0, 1, 6, 0, 1, 0, 1)]),
        (7, 7, 7, [window(0, 7, 0, 0, 25, 0, 25)]),
        (8, 7, 7, [window(0, 8, 0, 0, 25, 0, 25), window(6, 8, 6, 4, 8, 25, 29)]),
        (13, 7, 7, [window(0, 8, 0, 0, 25, 0, 25), window(6, 13, 1, 4, 28, 25, 49)]),
        (14, 7, 7, [window(0, 8, 0, 0, 25, 0, 25), window(6, 14, 0, 4, 32, 25, 53)]),
        (3, 1, 2, [window(0, 2, 0, 0, 1, 0, 1), window(0, 3, 0, 4, 12, 1, 9)]),
    ],
)
def test_window_plan(num_latent_frames: int, first_chunk: int, step: int, expected: list[Window]) -> None:
    assert plan_windows(num_latent_frames, first_chunk, step) == expected


@pytest.mark.parametrize(("first_chunk", "step"), [(7, 7), (1, 1), (3, 5), (9, 2)])
@pytest.mark.parametrize("num_latent_frames", [1, 2, 6, 7, 8, 15, 26, 32, 76, 251])
def test_windows_tile_the_clip(num_latent_frames: int, first_chunk: int, step: int) -> None:
    plan = plan_windows(num_latent_frames, first_chunk, step)
    assert [w.is_first for w in plan] == [True] + [False] * (len(plan) - 1)
    assert plan[0].out_start == 0
    assert [w.out_start for w in plan[1:]] == [w.out_stop for w in plan[:-1]]
    assert plan[-1].out_stop == 4 * (num_latent_frames - 1) + 1
    assert [w.padding for w in plan[:-1]] == [0] * (len(plan) - 1)
    for w in plan:
        decoded = 4 * w.num_latent_frames - (3 if w.is_first else 0)
        assert 0 <= w.start < w.stop <= num_latent_frames
        assert 0 <= w.keep_start < w.keep_stop <= decoded
        assert w.keep_stop - w.keep_start == w.out_stop - w.out_start


@pytest.mark.parametrize("arguments", [(0, 7, 7), (5, 0, 7), (5, 7, 0)])
def test_window_plan_refuses_nothing_to_do(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="at least 1, got 0"):
        plan_windows(*arguments)


def decode_brute_force(config: Mapping[str, Any], weights: dict[str, Tensor], latent: Tensor) -> Tensor:
    """The whole decode, written a second time and apart: float64, explicit padding, index arithmetic, no windows
    object. Lists are read from the input side of the published config; `latent` is (48, T, h, w)."""
    w = {k.removeprefix("decoder."): v.double() for k, v in weights.items()}
    first, step = config["first_chunk_size"], config["step_size"]

    def conv(name: str, x: Tensor) -> Tensor:  # (C, T, H, W)
        kernel = w[f"{name}.weight"]
        reach = kernel.shape[2] // 2
        index = torch.arange(-reach, x.shape[1] + reach).clamp(0, x.shape[1] - 1)
        pad = kernel.shape[3] // 2
        return functional.conv3d(
            functional.pad(x[:, index], (pad, pad, pad, pad))[None], kernel, w[f"{name}.bias"]
        )[0]

    def rms(x: Tensor, eps: float = 1e-8) -> Tensor:
        return x / (x.pow(2).mean(0) + eps).sqrt()

    def silu(x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def resnet(name: str, x: Tensor, relu: bool = False) -> Tensor:
        h = rms(x).clamp(min=0) if relu else silu(rms(x))
        h = conv(f"{name}.conv2.conv", silu(rms(conv(f"{name}.conv1.conv", h))))
        if f"{name}.conv_shortcut.conv.weight" in w:
            x = conv(f"{name}.conv_shortcut.conv", rms(x, 1e-6))
        return x + h

    def stack(z: Tensor, is_first: bool) -> Tensor:
        x = conv("conv_in.conv", z)
        layers = config["decoder_layers_per_block"][::-1]
        for j in range(layers[0]):
            x = resnet(f"mid_block.resnets.{j}", x)
        channels = x.shape[0]
        for i, width in enumerate(reversed(config["decoder_block_out_channels"])):
            block = f"up_blocks.{i}"
            scales = config["decoder_spatio_temporal_scaling"][::-1][i]
            if width != channels:
                x = resnet(f"{block}.conv_in", x)
                channels = width
            if scales and not config["decoder_spatio_only"][::-1][i]:
                y = conv(f"{block}.upsamplers.0.time_conv.conv", x)
                x = torch.stack(
                    [y[s * width : (s + 1) * width, t] for t in range(x.shape[1]) for s in (0, 1)], 1
                )
                if is_first:
                    x = x[:, 1:]
            if scales:
                name = f"{block}.upsamplers.0.resample.1"
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = torch.stack(
                    [
                        functional.conv2d(x[:, t], w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
                        for t in range(x.shape[1])
                    ],
                    1,
                )
            for j in range(layers[i + 1]):
                x = resnet(f"{block}.resnets.{j}", x, relu=scales)
        x = conv("conv_out.conv", silu(rms(x)))
        video = torch.empty(3, x.shape[1], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
        for rgb in range(3):
            for pw in range(2):
                for ph in range(2):
                    video[rgb, :, ph::2, pw::2] = x[rgb * 4 + pw * 2 + ph]
        return video

    statistics = json.loads((GOLDEN / "official/latent_statistics.json").read_text())
    mean, std = (torch.tensor(statistics[k], dtype=torch.float64).view(48, 1, 1, 1) for k in ("mean", "std"))
    t = latent.shape[1]
    z = latent.double() * std + mean
    while z.shape[1] < first or (z.shape[1] - first) % step:
        z = torch.cat([z, z[:, -1:]], 1)
    pieces = []
    edges = [0, *range(first, z.shape[1] + 1, step)]
    for begin, end in pairwise(edges):
        left, right = int(begin > 0), int(end < z.shape[1])
        video = stack(z[:, begin - left : end + right], begin == 0)
        pieces.append(video[:, 4 * left : video.shape[1] - 4 * right])
    return torch.cat(pieces, 1)[:, : 4 * t - 3]


@pytest.mark.parametrize(("first_chunk", "step", "t"), [(7, 7, 9), (1, 2, 4), (2, 1, 3), (3, 3, 2)])
def test_decode_is_the_composition_of_its_parts(first_chunk: int, step: int, t: int) -> None:
    config = dict(TINY_CONFIG) | {"first_chunk_size": first_chunk, "step_size": step}
    weights = tiny_state_dict(config)
    latent = random_latent(t, 2, 1)
    expected = decode_brute_force(config, weights, latent)
    video = TurboVAE.from_state_dict(config, weights).decode(latent)
    assert rel_err(video, expected) <= 1e-5


def test_windows_come_in_order_and_make_up_the_clip() -> None:
    model = TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict())
    latent = random_latent(9, 1, 2)
    pieces = list(model.decode_windows(latent))
    assert [tuple(p.shape) for p in pieces] == [(3, 25, 16, 32), (3, 8, 16, 32)]
    video = model.decode(latent)
    assert torch.equal(torch.cat(pieces, 1), video)
    assert torch.equal(model.decode_frames(latent), to_uint8(video))


def test_frames_report_each_window_and_can_be_cancelled() -> None:
    model = TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict())
    seen = []
    model.decode_frames(random_latent(15, 1, 1), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def cancel(done: int, total: int) -> None:
        raise Cancelled(f"after {done} of {total}")

    with pytest.raises(Cancelled, match="after 1 of 3"):
        model.decode_frames(random_latent(15, 1, 1), cancel)


def test_frames_are_clamped_and_truncated() -> None:
    levels = torch.tensor([-9.0, -1.0, -0.9999, 0.0, 0.999, 1.0, 9.0])
    frames = to_uint8(levels.view(1, 1, 1, 7).expand(3, 1, 1, 7))
    assert frames.shape == (1, 1, 7, 3)
    assert frames.is_contiguous()
    assert frames[0, 0, :, 2].tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_rms_is_computed_in_float32_and_rounded_once() -> None:
    x = (torch.randn(1, 300, 2, 3, 4, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-8).sqrt()
    out = channel_rms(x, 1e-8)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.float().bfloat16())


@pytest.mark.parametrize(
    ("latent", "match"),
    [
        (torch.zeros(47, 2, 2, 2), r"\(48, T, h, w\), got torch.float32 \(47, 2, 2, 2\)"),
        (torch.zeros(1, 48, 2, 2, 2), r"\(48, T, h, w\), got torch.float32 \(1, 48, 2, 2, 2\)"),
        (torch.zeros(48, 0, 2, 2), r"got torch.float32 \(48, 0, 2, 2\)"),
        (torch.zeros(48, 1, 2, 2).bfloat16(), r"got torch.bfloat16"),
        (np.zeros((48, 1, 2, 2), np.float32), r"\(48, T, h, w\), got ndarray"),
        (torch.full((48, 1, 2, 2), float("nan")), r"finite values, got 192 .* of 192"),
        (torch.zeros(48, 1, 2, 2).index_fill_(0, torch.tensor([5]), float("inf")), r"finite values, got 4 "),
    ],
)
def test_bad_latents_are_refused_at_the_call(latent: Any, match: str) -> None:
    model = TurboVAE.from_state_dict(TINY_CONFIG, tiny_state_dict())
    for decode in (model.decode, model.decode_frames, model.decode_windows):
        with pytest.raises(InputError, match=match):
            decode(latent)
