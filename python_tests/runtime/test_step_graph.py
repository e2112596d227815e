"""The captured step: recorded runs of every sampler, one graph for all prompts, and on a GPU replay against eager."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from backends import BACKENDS, device_of
from cases import Golden, load_golden
from dit_cases import CONFIG, golden_model, kernel_model
from magihuman_fast.errors import InputError
from magihuman_fast.kernels import ops
from magihuman_fast.model import sampler
from magihuman_fast.runtime.dit import ClipShape, KernelDiT
from magihuman_fast.runtime.graph import NO_STEP, StepGraph, StepSpec
from mismatch import require_equal, require_rel_err

PARTS = ("video", "audio")
SHAPE = ClipShape(3, 4, 6, 9)
DISTILLED = StepSpec(SHAPE, "renoise", max_steps=8)


def given(
    seed: int, tokens: int, steps: int = 3, shape: ClipShape = SHAPE, width: int = 64
) -> dict[str, Any]:
    """A distilled run's data, of a prompt of `tokens` tokens."""
    g = torch.Generator().manual_seed(seed)
    latent, audio = (48, shape.frames, shape.height, shape.width), (shape.audio, 64)
    return {
        "video": torch.randn(latent, generator=g),
        "audio": torch.randn(audio, generator=g),
        "texts": [torch.randn(tokens, width, generator=g)],
        "sigmas": sampler.flow_sigmas(steps),
        "coords": "v2",
        "noise": [(torch.randn(latent, generator=g), torch.randn(audio, generator=g)) for _ in range(steps)],
    }


def moved(data: dict[str, Any], device: torch.device) -> dict[str, Any]:
    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return type(value)(map(move, value)) if isinstance(value, (list, tuple)) else value

    return {name: move(value) for name, value in data.items()}


def finish(graph: StepGraph, data: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    graph.begin(**moved(data, graph.dit.device))
    for _ in range(len(data["sigmas"]) - 1):
        graph.replay()
    return graph.latents()


def recorded(golden: Golden, backend: ops.Backend) -> tuple[torch.Tensor, torch.Tensor]:
    """Repeat a recorded run, as the engine would."""
    dit = KernelDiT(golden_model(golden, device=device_of(backend)), backend=backend)
    video, audio = golden.batch0("in.video"), golden.batch0("in.audio")
    text, null = (golden.batch0(f"in.{n}")[: int(golden[f"in.{n}_len"])] for n in ("text", "null_text"))
    sr = golden.meta["sr"] == "True"
    guided = golden.meta["sr_cfg_number" if sr else "cfg_number"] == "2"
    sigmas = sampler.flow_sigmas(int(golden.meta["steps"]))
    shape = ClipShape(*video.shape[1:], len(audio))
    kind = "unipc" if sr or guided else "renoise"
    window = int(golden.meta["frame_receptive_field"]) if dit.config.local_attn_layers else None
    spec = StepSpec(shape, kind, guided, window, max_steps=8)
    data: dict[str, Any] = {
        "video": video,
        "audio": audio,
        "texts": [text, null] if guided else [text],
        "sigmas": sigmas,
        "coords": "v1" if sr else "v2",
        "fixed_audio": sr or golden.meta["a2v"] == "True",
    }
    if "in.image_latent" in golden:
        data["image_latent"] = golden.batch0("in.image_latent")
    if kind == "renoise":
        data["noise"] = list(
            zip(golden["noise.video"].squeeze(1), golden["noise.audio"].squeeze(1), strict=True)
        )
    elif sr and guided:
        data["guidance"] = (sampler.super_resolution_guidance(shape.frames), torch.tensor([1.0]))
    elif guided:
        scales = torch.tensor(sampler.video_guidance(sigmas)).unsqueeze(1)
        data["guidance"] = (scales, torch.tensor([sampler.AUDIO_GUIDANCE]))
    out = finish(StepGraph(dit, spec), data)
    return out[0].cpu(), out[1].cpu()


# Of every recorded run as much as `test_sampler.test_recorded_run` allows the reference.
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
@pytest.mark.parametrize("backend", BACKENDS)
def test_recorded_run(backend: ops.Backend, name: str, bound: float) -> None:
    golden = load_golden(f"sampler/{name}")
    video, audio = recorded(golden, backend)
    require_rel_err("video", video, golden.batch0("out.video"), bound)
    require_rel_err("audio", audio, golden.batch0("out.audio"), bound)
    if "in.image_latent" in golden:
        require_equal("image", video[:, :1], golden.batch0("in.image_latent"), says="is not what was given")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.slow
def test_one_graph_serves_every_prompt(backend: ops.Backend) -> None:
    """Text length, image, driving sound and steps are data: a used graph gives the bits of a fresh one."""
    dit = kernel_model(backend)
    used = StepGraph(dit, DISTILLED)
    held, driven = given(1, 150), given(2, 2, steps=1)
    held["image_latent"] = torch.randn(48, 1, SHAPE.height, SHAPE.width)
    driven["fixed_audio"] = True
    for data in (held, driven, given(3, 1), held):
        ours, fresh = finish(used, data), finish(StepGraph(dit, DISTILLED), data)
        for part, got, ref in zip(PARTS, ours, fresh, strict=True):
            require_equal(part, got, ref, says="of a used graph differs")
    out = finish(used, held)
    says = "is not what was given"
    require_equal("image", out[0][:, :1].cpu(), held["image_latent"], says=says)
    require_equal("sound", finish(used, driven)[1].cpu(), driven["audio"], says=says)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guided_solver_starts_anew(backend: ops.Backend) -> None:
    """UniPC's history of the run before is not read."""
    dit, spec = kernel_model(backend), StepSpec(SHAPE, "unipc", guided=True, max_steps=4)

    def data(seed: int) -> dict[str, Any]:
        run = given(seed, 5)
        del run["noise"]
        run["texts"].append(torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)))
        return run | {"guidance": (torch.full((3, 1), 2.0), torch.tensor([5.0]))}

    used = StepGraph(dit, spec)
    finish(used, data(1))
    for solver in (used.video, used.audio):
        solver.x_last.fill_(torch.nan)
        solver.history.fill_(torch.nan)
    outs = finish(used, data(2)), finish(StepGraph(dit, spec), data(2))
    for part, got, ref in zip(PARTS, *outs, strict=True):
        require_equal(part, got, ref, says="of a used graph differs")


def test_steps_beyond_the_last_change_nothing() -> None:
    graph = StepGraph(kernel_model("reference"), DISTILLED)
    graph.begin(**given(1, 4, steps=8))
    for _ in range(8):
        graph.replay()
    before = graph.latents()
    graph.replay()
    for got, ref in zip(graph.latents(), before, strict=True):
        assert torch.equal(got, ref)
    assert int(graph.video.step) == 9
    assert StepSpec.noise_steps(1000) < NO_STEP


@pytest.mark.parametrize(
    "spec",
    [
        DISTILLED,
        StepSpec(SHAPE, "unipc", max_steps=5),
        StepSpec(SHAPE, "unipc", guided=True, frame_window=1),
        StepSpec(replace(SHAPE, frames=9, audio=33), "renoise", max_steps=16),
    ],
)
def test_bytes_are_known_beforehand(spec: StepSpec) -> None:
    gc.collect()
    dit = kernel_model("reference")
    graph = StepGraph(dit, spec)
    storages: dict[int, int] = {}

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)
        elif isinstance(value, dict):
            collect(list(value.values()))
        elif type(value).__module__.startswith("magihuman_fast") and not isinstance(
            value, (KernelDiT, StepSpec)
        ):
            collect(list(vars(value).values()))

    collect(graph)
    held = sum(storages.values())
    assert 0 <= spec.nbytes(CONFIG) - held <= 64  # counters and a flag, rounded up


def test_bad_runs_are_named() -> None:
    graph = StepGraph(kernel_model("reference"), DISTILLED)
    with pytest.raises(InputError, match=r"steps: expected at most 8, got 9"):
        graph.begin(**given(1, 4, steps=9))
    short = given(1, 4)
    with pytest.raises(InputError, match=r"noise: expected 3 \(video, audio\) pairs, got 1"):
        graph.begin(**short | {"noise": short["noise"][:1]})
    assert [StepSpec.noise_steps(n) for n in (1, 8, 9)] == [8, 8, 16]


# --- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["renoise", "unipc"])
def test_replay_equals_eager(kind: Any) -> None:
    """Bitwise, after every step."""
    dit = kernel_model("gpu")
    spec = StepSpec(SHAPE, kind, guided=kind == "unipc", max_steps=8)
    data = given(1, 37, steps=5)
    if spec.guided:
        data["texts"].append(torch.randn(11, 64))
        data |= {"guidance": (torch.full((5, 1), 2.0), torch.tensor([5.0]))}
    captured, eager = StepGraph(dit, spec), StepGraph(dit, spec)
    assert captured.capture_seconds is not None
    assert captured.capture_seconds > 0
    eager._graph = None
    for graph in (captured, eager):
        graph.begin(**moved(data, dit.device))
    for step in range(5):
        captured.replay()
        eager.replay()
        for part, got, ref in zip(PARTS, captured.latents(), eager.latents(), strict=True):
            require_equal(part, got, ref, says="of replay and eager differ", facts={"step": step})


@pytest.mark.gpu
def test_capture_allocates_nothing() -> None:
    graph = StepGraph(kernel_model("gpu"), DISTILLED)
    finish(graph, given(1, 5))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        graph._step()
    assert torch.cuda.memory_allocated() == before
