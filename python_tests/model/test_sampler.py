"""Samplers against whole recorded runs, UniPC against the published solver."""

from __future__ import annotations

import json
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cases import Golden, draw_weights, load_golden
from magihuman_fast.errors import InputError
from magihuman_fast.model import sampler
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import DiT
from numerics import rel_err


@cache
def drawn(arch: str, seed: str, gain: str, c0: str, c1: str) -> DiT:
    config = DiTConfig.from_dict(json.loads(arch))
    meta = {"weights.seed": seed, "weights.gain": gain, "weights.c0": c0, "weights.c1": c1}
    return DiT.from_state_dict(config, draw_weights(config.state_dict_shapes(), meta))


def build(golden: Golden) -> DiT:
    return drawn(
        golden.meta["arch"], *(golden.meta[f"weights.{name}"] for name in ("seed", "gain", "c0", "c1"))
    )


def run(golden: Golden, **changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat a recorded run, choosing the sampler by its metadata."""
    dit = build(golden)
    video, audio = golden.batch0("in.video"), golden.batch0("in.audio")
    text, null = (golden.batch0(f"in.{n}")[: int(golden[f"in.{n}_len"])] for n in ("text", "null_text"))
    options: dict = {"steps": int(golden.meta["steps"])}
    if "in.image_latent" in golden:
        options["image_latent"] = golden.batch0("in.image_latent")
    guided = golden.meta["cfg_number" if golden.meta["sr"] == "False" else "sr_cfg_number"] == "2"
    if golden.meta["sr"] == "True":
        window = int(golden.meta["frame_receptive_field"]) if dit.config.local_attn_layers else None
        options |= {"frame_window": window} | changes
        return sampler.super_resolve(dit, video, audio, text, null if guided else None, **options)
    options |= {"fixed_audio": golden.meta["a2v"] == "True"} | changes
    if guided:
        return sampler.sample_guided(dit, video, audio, text, null, **options)
    noise = zip(golden["noise.video"].squeeze(1), golden["noise.audio"].squeeze(1), strict=True)
    return sampler.sample_distilled(dit, video, audio, text, noise=noise, **options)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("a_distill8_t2v", 1e-2),
        ("a_distill8_ti2v", 1e-2),
        ("a_base6_cfg2_t2v", 3e-2),
        ("a_base6_cfg2_ti2v", 3e-2),
        ("a_a2v_base4_cfg2", 3e-2),
        ("a_sr5_cfg1", 1e-2),
        ("a_sr5_cfg1_local", 1e-2),
        ("a_sr5_cfg2_trick", 1.2e-2),
    ],
)
def test_recorded_run(name: str, bound: float) -> None:
    golden = load_golden(f"sampler/{name}")
    sigmas = sampler.flow_sigmas(int(golden.meta["steps"]))
    assert rel_err(torch.from_numpy(sigmas), golden["sigmas"]) <= 1e-6
    assert sampler.timesteps(sigmas) == golden["timesteps"].tolist()
    video, audio = run(golden)
    assert rel_err(video, golden.batch0("out.video")) <= bound
    assert rel_err(audio, golden.batch0("out.audio")) <= bound


@pytest.mark.parametrize("steps", [5, 8, 32])
def test_unipc(steps: int) -> None:
    golden = load_golden("sampler/schedulers")
    sigmas = sampler.flow_sigmas(steps)
    assert rel_err(torch.from_numpy(sigmas), golden[f"unipc{steps}.sigmas"]) <= 1e-6
    assert sampler.timesteps(sigmas) == golden[f"unipc{steps}.timesteps"].tolist()
    x, solver = golden["in.x"], sampler.UniPC(sigmas)
    for i in range(steps):
        x = solver.step(torch.sin(1.3 * x + 0.1 * i), x)
    assert rel_err(x, golden[f"unipc{steps}.out"]) <= 1e-5


def test_unipc_is_exact_for_a_constant_clean_latent() -> None:
    """With v = (x - x0) / sigma the clean latent never changes, and every step must stay on the straight path."""
    x0, noise = torch.randn(4, 5), torch.randn(4, 5)
    sigmas = sampler.flow_sigmas(6)
    solver, x = sampler.UniPC(sigmas), (1 - sigmas[0]) * x0 + sigmas[0] * noise
    for i in range(6):
        x = solver.step((x - x0) / sigmas[i], x)
        assert rel_err(x, (1 - sigmas[i + 1]) * x0 + sigmas[i + 1] * noise) < 1e-5


def test_super_resolution_input() -> None:
    golden = load_golden("sampler/sr_prepare")
    assert rel_err(torch.from_numpy(sampler.zero_snr_sigmas()), golden["zerosnr_sigmas"]) <= 1e-5
    video, audio = golden.batch0("in.video"), golden.batch0("in.audio")
    noises = {"video_noise": golden.batch0("noise.video"), "audio_noise": golden.batch0("noise.audio")}
    for size in ((10, 16), (4, 10, 16)):
        out_video, out_audio = sampler.prepare_super_resolution(video, audio, size, **noises)
        assert rel_err(out_video, golden.batch0("out.video")) <= 1e-5
        assert rel_err(out_audio, golden.batch0("out.audio")) <= 1e-5
    for size in ((10, 14), (5, 10, 16), (10,), 10):
        with pytest.raises(InputError, match=r"expected"):
            sampler.prepare_super_resolution(video, audio, size, **noises)


class Denoiser:
    """A stand-in DiT whose velocity is known: it points from `x0` to the noise, plus a marker of the text."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.seen: list[SimpleNamespace] = []

    def velocity(self, video: torch.Tensor, audio: torch.Tensor, text: torch.Tensor, **options: Any) -> Any:
        self.seen.append(SimpleNamespace(video=video.clone(), audio=audio.clone(), **options))
        mark = float(text[0, 0])
        return torch.full_like(video, mark), torch.full_like(audio, mark)


TEXT, NULL = torch.full((3, 2), 1.0), torch.full((3, 2), 0.0)


def start(frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(48, frames, 2, 4), torch.randn(9, 64)


def test_one_distilled_step_is_the_clean_prediction() -> None:
    (video, audio), noise = start(), start()
    out_video, out_audio = sampler.sample_distilled(Denoiser(), video, audio, TEXT, steps=1, noise=[noise])
    sigma = sampler.flow_sigmas(1)[0]
    assert rel_err(out_video, video - sigma) < 1e-6
    assert rel_err(out_audio, audio - sigma) < 1e-6


def test_guidance_scales() -> None:
    """v = g for a text velocity of 1 and a null velocity of 0; Euler and UniPC agree on constant velocity and x0."""
    dit, (video, audio) = Denoiser(), start()
    out_video, out_audio = sampler.sample_guided(dit, video, audio, TEXT, NULL, steps=1)
    sigma = sampler.flow_sigmas(1)[0]  # timestep 999: both guided by 5
    assert rel_err(out_video, video - 5 * sigma) < 1e-6
    assert rel_err(out_audio, audio - 5 * sigma) < 1e-6
    # Below timestep 500 the video is guided by 2 and the sound still by 5.
    dit = Denoiser()
    sampler.sample_guided(dit, video, audio, TEXT, NULL, steps=32)
    late = [i for i, t in enumerate(sampler.timesteps(sampler.flow_sigmas(32))) if t <= 500]
    assert 0 < len(late) < 32
    sr = Denoiser()
    video = torch.zeros(48, 15, 2, 2)
    out, _ = sampler.super_resolve(sr, video, audio, TEXT, NULL, steps=1)
    guidance = -out[0, :, 0, 0] / sigma
    assert rel_err(guidance, torch.tensor([2.0] * 13 + [3.5] * 2)) < 1e-6
    assert {step.coords for step in sr.seen} == {"v1"}


@pytest.mark.parametrize("kind", ["distilled", "guided"])
def test_driving_audio_is_never_stepped(kind: str) -> None:
    dit, (video, audio) = Denoiser(), start()
    given = audio.clone()
    if kind == "distilled":
        noise = [start() for _ in range(4)]
        _, out = sampler.sample_distilled(dit, video, audio, TEXT, steps=4, noise=noise, fixed_audio=True)
    else:
        _, out = sampler.sample_guided(dit, video, audio, TEXT, NULL, steps=4, fixed_audio=True)
    assert torch.equal(out, given)
    assert all(torch.equal(step.audio, given) for step in dit.seen)


@pytest.mark.parametrize("kind", ["distilled", "guided", "sr"])
def test_image_is_held_in_frame_0(kind: str) -> None:
    dit, (video, audio) = Denoiser(), start()
    image = torch.randn(48, 1, 2, 4)
    if kind == "distilled":
        noise = [start() for _ in range(3)]
        out, _ = sampler.sample_distilled(dit, video, audio, TEXT, steps=3, noise=noise, image_latent=image)
    elif kind == "guided":
        out, _ = sampler.sample_guided(dit, video, audio, TEXT, NULL, steps=3, image_latent=image)
    else:
        out, _ = sampler.super_resolve(dit, video, audio, TEXT, steps=3, image_latent=image, frame_window=11)
        assert {step.frame_window for step in dit.seen} == {11}
    assert torch.equal(out[:, :1], image)
    assert all(torch.equal(step.video[:, :1], image) for step in dit.seen)


def test_progress_and_early_end() -> None:
    seen = []

    def stop_at_two(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.sample_distilled(
            Denoiser(), *start(), TEXT, steps=5, noise=[start() for _ in range(5)], on_step=stop_at_two
        )
    assert seen == [(1, 5), (2, 5)]


def test_noise_is_drawn_video_first_one_step_at_a_time() -> None:
    shapes = (48, 3, 2, 4), (9, 64)
    pairs = sampler.gaussian_noise(torch.Generator().manual_seed(3), *shapes)
    again = torch.Generator().manual_seed(3)
    for _ in range(2):
        video, audio = next(pairs)
        assert torch.equal(video, torch.randn(1, *shapes[0], generator=again)[0])
        assert torch.equal(audio, torch.randn(1, *shapes[1], generator=again)[0])


def test_schedule_closed_form() -> None:
    sigmas = sampler.flow_sigmas(32)
    plain = [0.999 * (1 - i / 32) for i in range(32)]
    assert np.allclose(sigmas, [5 * s / (1 + 4 * s) for s in plain] + [0.0], rtol=1e-12)
    for step, sigma in zip(sampler.unipc_steps(sigmas), sigmas, strict=False):
        assert math.isclose(step.sigma, sigma, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps: expected an integer from 1 to 1000, got 0"),
        ({"steps": 2.0}, "steps: expected an integer"),
        ({"steps": 9}, r"noise: expected 9 \(video, audio\) pairs, got 8"),
        ({"image_latent": torch.zeros(48, 1, 6, 6)}, r"image latent: expected shape \(48, 1, 6, 8\)"),
    ],
)
def test_bad_calls_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(load_golden("sampler/a_distill8_t2v"), **change)


def test_latents_are_checked() -> None:
    video, audio = start()
    with pytest.raises(InputError, match=r"video latent: expected 4 dimensions, float32"):
        sampler.sample_distilled(Denoiser(), video.bfloat16(), audio, TEXT, noise=[])
    with pytest.raises(InputError, match=r"audio latent: expected 2 dimensions"):
        sampler.sample_distilled(Denoiser(), video, audio[None], TEXT, noise=[])
    noise = [(video.double(), audio.double())]
    with pytest.raises(InputError, match=r"noise: expected .* torch.float32, on cpu; got .* torch.float64"):
        sampler.sample_distilled(Denoiser(), video, audio, TEXT, steps=1, noise=noise)
    with pytest.raises(InputError, match=r"noise: expected shape \(48, 3, 2, 4\)"):
        sampler.sample_distilled(Denoiser(), video, audio, TEXT, noise=[(video[:, :1], audio)])
