"""The engine: which path runs, the pool of captured sizes, threads, and what it refuses before allocating.

The kernels' step runs here on the backend "reference": everything but the kernels themselves, on any machine.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_cases import CONFIG, random_model
from magihuman_fast.errors import InputError, InsufficientMemory
from magihuman_fast.kernels import ops
from magihuman_fast.model import sampler
from magihuman_fast.runtime.dit import Activations, ClipShape
from magihuman_fast.runtime.engine import Engine, choose_path
from magihuman_fast.runtime.environment import KERNELS, REFERENCE
from magihuman_fast.runtime.graph import GRAPH_BYTES, StepGraph, StepSpec
from numerics import rel_err

SHAPE = ClipShape(2, 4, 4, 5)
TEXT, NULL = torch.randn(7, 64), torch.randn(3, 64)


def engine(backend: ops.Backend | None = "reference") -> Engine:
    return Engine(random_model(), random_model(), backend=backend)


def latents(frames: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(48, frames, 4, 4, generator=g), torch.randn(5, 64, generator=g)


def distilled(of: Engine, frames: int = 2, seed: int = 0, **options: Any) -> sampler.Latents:
    video, audio = latents(frames, seed)
    noise = sampler.gaussian_noise(
        torch.Generator().manual_seed(seed), tuple(video.shape), tuple(audio.shape)
    )
    return of.sample_distilled(video, audio, TEXT, noise=noise, **{"steps": 2} | options)


def spec(frames: int = 2) -> StepSpec:
    return StepSpec.first_stage(replace(SHAPE, frames=frames), guided=False, steps=2)


def bytes_of(frames: int = 2) -> int:
    return spec(frames).nbytes(CONFIG) + GRAPH_BYTES


def frames_held(of: Engine) -> list[int]:
    """Latent frames of the captured sizes, that used longest ago first."""
    return [held.shape.frames for _, held in of.pool.keys]


# Each stage on either path: both paths have the samplers' interface, and agree as the precision allows.
STAGES = {
    "distilled": lambda of, **options: distilled(of, **options),
    "guided": lambda of, **options: of.sample_guided(*latents(), TEXT, NULL, steps=3, **options),
    "sr": lambda of, **options: of.super_resolve(*latents(), TEXT, steps=3, frame_window=1, **options),
    "guided sr": lambda of, **options: of.super_resolve(*latents(), TEXT, NULL, steps=3, **options),
}


@pytest.mark.parametrize("stage", list(STAGES))
def test_both_paths_agree(stage: str) -> None:
    image = torch.randn(48, 1, 4, 4)
    kernels, plain, exact = engine(), engine(None), Engine(*[random_model(dtype=torch.float32)] * 2)
    got, peer, ref = (STAGES[stage](of, image_latent=image) for of in (kernels, plain, exact))
    for mine, theirs, truth in zip(got, peer, ref, strict=True):
        # Where the sound is held fixed all three are the same.
        assert rel_err(mine, truth) <= 2 * rel_err(theirs, truth)
    assert torch.equal(got[0][:, :1], image)
    for again, first in zip(STAGES[stage](kernels, image_latent=image), got, strict=True):
        assert torch.equal(again, first)


def test_path_is_chosen_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="magihuman_fast.runtime.engine"):
        plain = engine(None)
        distilled(plain)
        distilled(plain)
    assert [record.getMessage() for record in caplog.records] == [
        f"the models run on the {plain.path.name}: {plain.path.reason}"
    ]
    reason = ops.gpu_unavailable("cpu")
    assert (plain.path.name, plain.path.reason) == (REFERENCE, reason)
    assert engine().path.name == KERNELS
    with pytest.raises(InputError, match=r"kernels: expected a model and a device that they run on: "):
        choose_path([random_model()], kernels=True)
    assert choose_path([random_model()], kernels=False)[1].reason == "asked for"


def test_limits_of_the_kernels_choose_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "gpu_unavailable", lambda device: None)
    assert choose_path([random_model()], check=False)[0] == "gpu"
    backend, path = choose_path([random_model(), random_model(dtype=torch.float32)])
    assert backend is None
    assert path.reason == "the kernels compute in bfloat16, not torch.float32"


def test_pool_keeps_what_was_used_last() -> None:
    e = engine()
    e.limit = bytes_of(2) + bytes_of(3) + 1
    distilled(e, 2)
    distilled(e, 3)
    assert frames_held(e) == [2, 3]
    graph = e.pool._graphs["denoise", spec(3)]
    distilled(e, 3)
    distilled(e, 2)
    assert frames_held(e) == [3, 2]
    assert e.pool._graphs["denoise", spec(3)] is graph  # not captured again
    distilled(e, 1)
    assert frames_held(e) == [2, 1]
    assert e.pool.nbytes <= e.limit
    # There may be less room than there was.
    e.limit = bytes_of(2)
    distilled(e, 2)
    assert frames_held(e) == [2]
    # What was dropped is captured anew, with the same result.
    e.limit = None
    for got, ref in zip(distilled(e, 3), distilled(engine(), 3), strict=True):
        assert torch.equal(got, ref)
    e.make_room(0)
    assert frames_held(e) == []


def test_stages_have_steps_of_their_own() -> None:
    """One shape, two models: never the one's graph for the other."""
    first, second = random_model(), random_model()
    for layer in second.layers:
        layer.proj.mul_(2)
    e = Engine(first, second, backend="reference")
    e.sample_guided(*latents(), TEXT, NULL, steps=1)
    got, _ = e.super_resolve(*latents(), TEXT, NULL, steps=1)
    ref, _ = Engine(second, second, backend="reference").super_resolve(*latents(), TEXT, NULL, steps=1)
    assert torch.equal(got, ref)
    assert [stage for stage, _ in e.pool.keys] == ["denoise", "super_resolution"]


def test_setup_captures_ahead() -> None:
    e = engine()
    e.setup([("denoise", spec(2)), ("denoise", spec(3)), ("denoise", spec(2))])
    assert frames_held(e) == [2, 3]
    graph = e.pool._graphs["denoise", spec(2)]
    distilled(e, 2)
    assert e.pool._graphs["denoise", spec(2)] is graph
    plain = engine(None)
    plain.setup([("denoise", spec(2))])
    assert frames_held(plain) == []


def test_memory_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    e.limit = bytes_of(4)
    distilled(e, 2)

    def untouched(*args: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(StepGraph, "__init__", untouched)
    message = (
        r"size: a step of 64x64 with 9 latent frames needs .* are free for them; 3 latent frames would fit"
    )
    with pytest.raises(InsufficientMemory, match=message):
        distilled(e, 9)
    with pytest.raises(InsufficientMemory, match=message):
        e.setup([("denoise", spec(2)), ("denoise", spec(9))])
    with pytest.raises(InsufficientMemory, match=r"together; each of them alone would fit"):
        e.setup([("denoise", spec(2)), ("denoise", spec(3))])
    assert frames_held(e) == [2]  # what was captured is still there
    e.limit = 1000
    with pytest.raises(InsufficientMemory, match=r"no length fits at this size"):
        distilled(e, 4)


def test_threads_take_turns() -> None:
    """Results are those of one thread, also where sizes push one another out."""
    e = engine()
    e.limit = bytes_of(3)
    jobs = [(frames, seed) for seed in range(3) for frames in (2, 3)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda job: distilled(e, *job), jobs))
    for job, result in zip(jobs, together, strict=True):
        for got, ref in zip(result, distilled(engine(), *job), strict=True):
            assert torch.equal(got, ref)
    assert e.pool.nbytes <= e.limit


def test_progress_and_end_between_steps() -> None:
    e, seen = engine(), []

    def stop_at_two(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(e, steps=5, on_step=stop_at_two)
    assert seen == [(1, 5), (2, 5)]
    # The engine is free again, and the run that was ended leaves no trace.
    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(distilled, e).result(timeout=60)
    for got, ref in zip(result, distilled(engine()), strict=True):
        assert torch.equal(got, ref)


def test_noise_is_drawn_step_by_step_in_order() -> None:
    """All of it before the first step, and no more than is used: the generator goes on where the reference's does."""
    states = []
    for backend in ("reference", None):
        generator = torch.Generator().manual_seed(3)
        noise = sampler.gaussian_noise(generator, (48, 2, 4, 4), (5, 64))
        engine(backend).sample_distilled(*latents(), TEXT, steps=3, noise=noise)
        states.append(torch.randn(4, generator=generator))
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, r"steps: expected an integer from 1 to 1000, got 0"),
        ({"noise": []}, r"noise: expected 2 \(video, audio\) pairs, got 0"),
        ({"noise": [latents(3)]}, r"noise: expected shape \(48, 2, 4, 4\)"),
        ({"image_latent": torch.zeros(48, 1, 2, 4)}, r"image latent: expected shape \(48, 1, 4, 4\)"),
        ({"text": torch.zeros(4, 60)}, r"text: expected 64 channels, got \(4, 60\)"),
        ({"text": torch.zeros(641, 64)}, r"text: expected at most 640 tokens, got 641"),
        ({"video": torch.zeros(48, 2, 4, 3)}, r"video: expected even latent height and width"),
        ({"audio": torch.zeros(5, 64).double()}, r"audio latent: expected 2 dimensions, float32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", None])
def test_bad_calls_are_named(backend: ops.Backend | None, change: dict[str, Any], message: str) -> None:
    video, audio = latents()
    given: dict[str, Any] = {"video": video, "audio": audio, "text": TEXT, "steps": 2}
    given["noise"] = [latents(), latents()]
    with pytest.raises(InputError, match=message):
        engine(backend).sample_distilled(**given | change)


def test_a_failed_capture_leaves_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    with monkeypatch.context() as patch:
        patch.setattr(
            Activations, "__init__", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory"))
        )
        with pytest.raises(RuntimeError, match="out of memory"):
            distilled(e)
    assert frames_held(e) == []
    assert not threading.current_thread().daemon
    distilled(e)


# --- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_two_threads_on_a_gpu() -> None:
    def run(of: Engine, seed: int) -> sampler.Latents:
        video, audio = (x.cuda() for x in latents(2, seed))
        generator = torch.Generator("cuda").manual_seed(seed)
        noise = sampler.gaussian_noise(generator, tuple(video.shape), tuple(audio.shape))
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            result = of.sample_distilled(video, audio, TEXT.cuda(), steps=8, noise=noise)
            torch.cuda.current_stream().synchronize()
        return result

    e = Engine(random_model("cuda"), backend="gpu")
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(lambda seed: run(e, seed), range(8)))
    for seed, result in enumerate(together):
        for got, ref in zip(result, run(e, seed), strict=True):
            assert torch.equal(got, ref)
