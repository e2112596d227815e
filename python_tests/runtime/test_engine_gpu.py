"""Whole runs at full size on a Hopper GPU: drift from float32, any text on one graph, memory over many clips, threads.

The same checks run here at a toy size on a CPU, so that what a GPU will be asked is known to be answerable.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from dit_cases import CONFIG
from magihuman_fast import MagiHumanPipeline
from magihuman_fast.checkpoints.synthetic import random_dit_tensors
from magihuman_fast.cli.random_models import random_dit, random_pipeline
from magihuman_fast.kernels import ops
from magihuman_fast.model import sampler
from magihuman_fast.model.config import DiTConfig, is_layer_linear
from magihuman_fast.model.dit import DiT, windowed_layers
from magihuman_fast.model.packing import PackedTokens, WindowRange
from magihuman_fast.pipeline.generation import Beside
from magihuman_fast.runtime.dit import ClipShape, KernelDiT
from magihuman_fast.runtime.engine import Engine
from magihuman_fast.runtime.graph import StepGraph, StepSpec
from magihuman_fast.runtime.memory_plan import RESERVE_BYTES
from mismatch import require, require_at_most, require_equal, require_rel_err
from numerics import rel_err


@dataclass(frozen=True)
class Scale:
    """A model's sizes, a clip, and where they run."""

    config: DiTConfig
    shape: ClipShape
    device: str
    backend: ops.Backend

    def latents(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        g, s = torch.Generator(self.device).manual_seed(seed), self.shape
        return (
            torch.randn(48, s.frames, s.height, s.width, generator=g, device=self.device),
            torch.randn(s.audio, 64, generator=g, device=self.device),
        )

    def text(self, tokens: int) -> torch.Tensor:
        g = torch.Generator(self.device).manual_seed(tokens)
        return torch.randn(tokens, self.config.text_in_channels, generator=g, device=self.device)

    def noise(self, seed: int) -> Iterator[sampler.Latents]:
        video, audio = self.latents(0)
        generator = torch.Generator(self.device).manual_seed(seed)
        return sampler.gaussian_noise(generator, tuple(video.shape), tuple(audio.shape))


TOY = Scale(CONFIG, ClipShape(3, 4, 6, 9), "cpu", "sim")
FULL = Scale(DiTConfig(), ClipShape.of((448, 256), 126), "cuda", "gpu")
SCALES = [pytest.param(TOY, id="toy"), pytest.param(FULL, id="256p", marks=pytest.mark.gpu)]


class Exact(DiT):
    """The same weights in float32 arithmetic, one layer at a time: two models in float32 would fill an H100."""

    def __init__(self, dit: DiT) -> None:
        vars(self).update(vars(dit))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def layer(
        self, index: int, x: torch.Tensor, tokens: PackedTokens, windows: list[WindowRange] | None = None
    ) -> None:
        w = self.layers[index]
        w = replace(w, **{field.name: getattr(w, field.name).float() for field in fields(w)})
        self.apply_layer(w, self.config.is_gelu(index), x, tokens, windows)


@pytest.mark.parametrize("scale", SCALES)
def test_drift_of_a_whole_run(scale: Scale) -> None:
    """After 8 steps no further from float32 than twice what the reference path is in the same precision."""
    dit = random_dit(scale.config, device=scale.device)
    kernels, plain = Engine(dit, backend=scale.backend), Engine(dit, kernels=False)
    text = scale.text(37)

    def run(of: Engine) -> sampler.Latents:
        return of.sample_distilled(*scale.latents(1), text, steps=8, noise=scale.noise(2))

    exact = sampler.sample_distilled(Exact(dit), *scale.latents(1), text, steps=8, noise=scale.noise(2))
    for part, got, peer, ref in zip(("video", "audio"), run(kernels), run(plain), exact, strict=True):
        worst = (peer - ref).abs().max()
        require_rel_err(part, got, ref, 2 * rel_err(peer, ref), bound=4 * worst)
        largest = (got - ref).abs().max()
        require_at_most(f"{part}:", largest, 4 * worst, got=got, ref=ref, bound=4 * worst)


def test_exact_is_float32() -> None:
    """The float32 run above is that of a model held in float32."""
    weights = dict(random_dit_tensors(TOY.config))
    for name, tensor in weights.items():
        weights[name] = tensor.bfloat16().float() if is_layer_linear(name) else tensor
    rounded, full = (
        DiT.from_state_dict(TOY.config, weights, dtype=d) for d in (torch.bfloat16, torch.float32)
    )
    given = (*TOY.latents(1), TOY.text(5))
    for got, ref in zip(Exact(rounded).velocity(*given), full.velocity(*given), strict=True):
        assert rel_err(got, ref) <= 1e-6


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["distilled", "windowed"])
def test_any_text_on_one_graph(scale: Scale, kind: str) -> None:
    """A second prompt of another length on a used graph equals a fresh run; on a GPU replay equals eager, bitwise."""
    window = None if kind == "distilled" else 1
    config = replace(scale.config, local_attn_layers=windowed_layers(scale.config.num_layers))
    dit = KernelDiT(random_dit(config, device=scale.device), backend=scale.backend)
    if window is None:
        spec = StepSpec.first_stage(scale.shape, guided=False, steps=3)
    else:
        spec = StepSpec.super_resolution(scale.shape, guided=False, frame_window=window)

    def run(graph: StepGraph, tokens: int) -> sampler.Latents:
        options: dict[str, Any] = {"sigmas": sampler.flow_sigmas(3), "coords": "v1"}
        graph.begin(*scale.latents(tokens), [scale.text(tokens)], noise=scale.noise(tokens), **options)
        for _ in range(3):
            graph.replay()
        return graph.latents()

    used = StepGraph(dit, spec)
    run(used, 20)
    second = run(used, 3)
    fresh = StepGraph(dit, spec)
    eager = StepGraph(dit, spec)
    eager._graph = None
    for name, other in (("fresh", fresh), ("eager", eager)):
        for part, got, ref in zip(("video", "audio"), second, run(other, 3), strict=True):
            require_equal(part, got, ref, says=f"of a used and a {name} graph differ")


def toy_pipeline(device: str, backend: ops.Backend) -> MagiHumanPipeline:
    # Kernels are also tested on machines that have torch and little else.
    pytest.importorskip("diffusers")
    return random_pipeline("tiny", sr="1080p", device=device, backend=backend)


REQUEST: dict[str, Any] = {
    "seconds": 1,
    "width": 64,
    "height": 64,
    "steps": 2,
    "sr_steps": 1,
    "sr_size": (64, 96),
}
PLACES = [
    pytest.param("cpu", "reference", 8, id="cpu"),
    pytest.param("cuda", "gpu", 200, id="gpu", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("device", "backend", "count"), PLACES)
def test_many_clips_leave_no_memory_behind(device: str, backend: ops.Backend, count: int) -> None:
    pipe = toy_pipeline(device, backend)
    first = pipe("Speaker 0.", **REQUEST)
    held = []
    for i in range(1, count):
        # Few prompts, because the last 16 are kept; of many lengths.
        result = pipe(f"Speaker {i % 7} of many, {'very ' * (i % 7)}calm.", **REQUEST | {"seed": i})
        if device == "cuda" and i >= count // 10:
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held)) <= 1
    assert len(pipe.engine.pool.keys) == 2
    assert not np.array_equal(result.frames, first.frames)
    assert np.array_equal(pipe("Speaker 0.", **REQUEST).frames, first.frames)


@pytest.mark.parametrize(("device", "backend", "count"), PLACES)
def test_two_threads(device: str, backend: ops.Backend, count: int) -> None:
    pipe = toy_pipeline(device, backend)
    prompts = [f"Speaker {i} says hello." for i in range(min(count, 20))]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda prompt: pipe(prompt, **REQUEST), prompts))
    for prompt, result in zip(prompts, together, strict=True):
        alone = pipe(prompt, **REQUEST)
        assert np.array_equal(alone.frames, result.frames)
        assert np.array_equal(alone.audio, result.audio)


@pytest.mark.gpu
def test_memory_is_what_was_planned() -> None:
    """5 seconds of 256p at full size, all but the text encoder's depth: never more than the plan says, and beside the
    weights what the plan leaves alone for what is counted nowhere."""
    pytest.importorskip("diffusers")
    pipe = random_pipeline("full", device="cuda")
    torch.cuda.reset_peak_memory_stats()
    plan = next(p for p in pipe.memory_plan() if (p.preset, p.text_encoder) == ("256p", "device"))
    held = torch.cuda.memory_allocated()
    require(held <= 1.02 * plan.weight_bytes, "weights take more than planned", held=held, plan=str(plan))
    pipe.setup()
    pipe("A woman says hello.")
    most, limit = torch.cuda.max_memory_allocated(), plan.kept_bytes + RESERVE_BYTES
    require(most <= limit, "a clip takes more than planned", most=most, limit=limit, plan=str(plan))


@pytest.mark.gpu
def test_work_beside_the_main_stream() -> None:
    """It sees what was queued before, its result can be used at once, and what it raises arrives."""
    x = torch.zeros(1 << 24, device="cuda")
    with Beside(torch.cuda.Stream()) as beside:
        for _ in range(50):
            x += 1
        doubled = beside.start(lambda: 2 * x)
        assert (doubled() == 100).all()

        def fail() -> None:
            raise ValueError("beside")

        failed = beside.start(fail)
        with pytest.raises(ValueError, match="beside"):
            failed()
