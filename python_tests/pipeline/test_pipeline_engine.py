"""The pipeline on the engine: kernels from tokens to frames in the simulator, services, memory, the text encoder."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loading_cases import LOAD
from magihuman_fast import Cancelled, InputError, InsufficientMemory, MagiHumanPipeline
from magihuman_fast.checkpoints.loading import load_components
from magihuman_fast.codecs.text_encoder import TextEncoder, TextEncoderOnDisk
from magihuman_fast.kernels.ops import Backend
from magihuman_fast.runtime.dit import ClipShape
from magihuman_fast.runtime.graph import GRAPH_BYTES, StepGraph, StepSpec
from magihuman_fast.runtime.memory_plan import decoder_bytes
from magihuman_fast.runtime.turbo_vae import TurboVAE, decode_bytes
from media_cases import portrait, voice
from numerics import rel_err

SMALL: dict[str, Any] = {"seconds": 1, "width": 64, "height": 64, "steps": 2}


def on_backend(root: Path, backend: Backend | None, **options: Any) -> MagiHumanPipeline:
    """A pipeline whose DiT, and in the simulator whose decoder too, run on `backend`."""
    parts = vars(load_components(root, **LOAD | options))
    if backend == "sim":
        parts = parts | {"turbo_vae": simulated_decoder(root)}
    return MagiHumanPipeline(**parts, backend=backend)


def simulated_decoder(root: Path) -> TurboVAE:
    return TurboVAE.from_pretrained(root / "turbo_vae", dtype=torch.bfloat16, backend="sim")


@pytest.fixture(scope="module")
def captured(tiny_checkpoint: Path) -> MagiHumanPipeline:
    """The kernels' steps, computed by PyTorch operations."""
    return on_backend(tiny_checkpoint, "reference")


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "distill", "sr": "1080p"},
        {"variant": "base", "sr": "540p"},
    ],
    ids=["distilled and windowed", "guided"],
)
@pytest.mark.slow
def test_kernels_from_tokens_to_frames(tiny_checkpoint: Path, options: dict[str, Any]) -> None:
    """The whole pipeline with the simulated kernels: at most twice as far from float32 as the reference path."""
    request: dict[str, Any] = {**SMALL, "sr_steps": 2, "sr_size": (64, 96), "image": portrait(), "seed": 3}
    request["sr_guidance"] = options["variant"] == "base"
    exact = on_backend(tiny_checkpoint, None, **options | {"precision": "fp32"})("She nods.", **request)
    plain = on_backend(tiny_checkpoint, None, **options)("She nods.", **request)
    kernels = on_backend(tiny_checkpoint, "sim", **options)("She nods.", **request)
    assert kernels.frames.shape == exact.frames.shape == (25, 96, 64, 3)
    for name in ("frames", "audio"):
        got, peer, ref = (torch.from_numpy(getattr(r, name)).double() for r in (kernels, plain, exact))
        assert rel_err(got, ref) <= 2 * rel_err(peer, ref)
        assert (got - ref).abs().max() <= 4 * (peer - ref).abs().max()
    assert (
        np.abs(exact.frames.astype(int) - exact.frames.mean()).mean() > 5
    )  # there is a picture to be wrong about


def test_same_seed_same_bytes(captured: MagiHumanPipeline) -> None:
    request = {**SMALL, "seed": 7, "image": portrait()}
    first = captured("A man sings.", **request)
    captured("Something else, with sound.", audio=voice(1), **SMALL)
    again = captured("A man sings.", **request)
    assert np.array_equal(first.frames, again.frames)
    assert np.array_equal(first.audio, again.audio)
    assert not np.array_equal(captured("A man sings.", **request | {"seed": 8}).frames, first.frames)


def test_setup(tiny_checkpoint: Path) -> None:
    pipe = on_backend(tiny_checkpoint, "reference", sr="540p")
    pipe.setup([(64, 64)], seconds=1, steps=2)
    keys = pipe.engine.pool.keys
    assert [(stage, spec.shape.size) for stage, spec in keys] == [
        ("denoise", (64, 64)),
        ("super_resolution", (544, 544)),
    ]
    held = dict(pipe.engine.pool._graphs)
    pipe("Hello.", **SMALL | {"sr_steps": 1})
    assert dict(pipe.engine.pool._graphs) == held  # nothing was captured again
    with pytest.raises(InputError, match=r"size: expected sides of 64 to 4096 pixels, got 5000"):
        pipe.setup([(5000, 64)])


def test_memory(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that does not fit is refused before anything is allocated; captured steps make room for a decode."""
    pipe = on_backend(tiny_checkpoint, "reference")
    plan = pipe.memory_plan(seconds=1)
    weights = next(p.weight_bytes for p in plan if (p.preset, p.text_encoder) == ("256p", "device"))
    spec = StepSpec.first_stage(ClipShape.of((64, 64), 26), guided=False, steps=2)
    step = spec.nbytes(pipe.dit.config) + GRAPH_BYTES
    pipe.memory_limit = weights + step
    first = pipe("Hello.", **SMALL)
    assert pipe.engine.limit == step
    assert pipe.engine.pool.nbytes <= step
    with monkeypatch.context() as patch:
        patch.setattr(StepGraph, "__init__", lambda *args: pytest.fail("allocated"))
        patch.setattr(pipe.text_encoder, "encode", lambda *args, **options: pytest.fail("encoded"))
        message = r"size, seconds: 9 s of 64x64 need .* are free; 1.\d s would fit at this size"
        with pytest.raises(InsufficientMemory, match=message):
            pipe("Hello.", **SMALL | {"seconds": 9})
        with pytest.raises(InsufficientMemory, match=r"of 64x64 need"):
            pipe.setup([(64, 64)], seconds=9)
    again = pipe("Hello.", **SMALL)
    assert np.array_equal(first.frames, again.frames)


@pytest.mark.slow
def test_steps_and_decoder_take_turns_or_stay(tiny_checkpoint: Path) -> None:
    """With room for both, both stay for the next clip; with room for the larger only, each makes way for the other."""
    parts = vars(load_components(tiny_checkpoint, **LOAD)) | {"turbo_vae": simulated_decoder(tiny_checkpoint)}
    pipe = MagiHumanPipeline(**parts, backend="reference")
    weights = next(p.weight_bytes for p in pipe.memory_plan(1) if p.text_encoder == "device")
    spec = StepSpec.first_stage(ClipShape.of((64, 64), 26), guided=False, steps=2)
    step = spec.nbytes(pipe.dit.config) + GRAPH_BYTES
    decode = decode_bytes(pipe.turbo_vae.config, (64, 64), 7)
    pipe.memory_limit = weights + step + decode
    first = pipe("Hello.", **SMALL)
    assert pipe.engine.pool.nbytes == step
    # On a CPU no frames are on their way to the host.
    assert 0 < pipe.turbo_vae.held_bytes <= decode
    pipe.memory_limit = weights + max(step, decode)
    second = pipe("Hello.", **SMALL)
    assert (pipe.engine.pool.nbytes, pipe.turbo_vae.held_bytes) == (0, 0)
    assert np.array_equal(first.frames, second.frames)
    # A larger clip's buffers do not stay in the way of a smaller one's steps.
    pipe.memory_limit = weights + 3 * (step + decode)
    pipe.turbo_vae.decode_frames(torch.randn(48, 7, 4, 6))
    assert pipe.turbo_vae.held_bytes > decode
    pipe.setup([(64, 64)], seconds=1, steps=2)
    assert (pipe.engine.pool.nbytes, pipe.turbo_vae.held_bytes) == (step, 0)


def test_what_a_pipeline_holds_counts_as_room(
    captured: MagiHumanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 1 << 30
    monkeypatch.setattr("magihuman_fast.runtime.memory_plan.available_memory", lambda: free)
    spec = StepSpec.first_stage(ClipShape.of((64, 64), 26), guided=False, steps=2)
    decode = decoder_bytes(captured._sizes, spec.shape)
    for held in (0, spec.nbytes(captured.dit.config) + GRAPH_BYTES):
        captured.engine.make_room(held)
        assert captured.engine.pool.nbytes == held
        captured.setup([(64, 64)], seconds=1, steps=2)
        assert captured.engine.limit == free + held - decode


def test_setup_makes_the_last_sizes_decoder_ready(
    captured: MagiHumanPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(captured.turbo_vae, "backend", "gpu")
    monkeypatch.setattr(captured.turbo_vae, "decode_frames", lambda video: shapes.append(tuple(video.shape)))
    captured.setup([(64, 64), (96, 64)], seconds=1, steps=2)
    captured.setup([], seconds=1)
    assert shapes == [(48, 7, 4, 6)]


def test_models_that_do_not_fit(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def untouched(*args: object, **options: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("magihuman_fast.checkpoints.loading.DiT.from_checkpoint", untouched)
    monkeypatch.setattr("magihuman_fast.checkpoints.loading.TextEncoder.from_pretrained", untouched)
    message = r"memory: expected room for 256p by where the text encoder is kept, .* 9.8 KiB are free"
    with pytest.raises(InsufficientMemory, match=message):
        MagiHumanPipeline.from_pretrained(tiny_checkpoint, device="cpu", memory_limit=10_000)


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_text_encoder_places(tiny_checkpoint: Path, captured: MagiHumanPipeline, place: str) -> None:
    pipe = on_backend(tiny_checkpoint, "reference", text_encoder_on=place)
    assert isinstance(pipe.text_encoder, TextEncoderOnDisk) == (place == "disk")
    result, ref = pipe("Hello there.", **SMALL), captured("Hello there.", **SMALL)
    assert np.array_equal(result.frames, ref.frames)
    with pytest.raises(
        InputError, match=r"text_encoder_on: expected one of auto, device, cpu, disk, got 'ram'"
    ):
        on_backend(tiny_checkpoint, None, text_encoder_on="ram")


def test_text_encoder_on_disk_is_loaded_once_a_block(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint / "t5gemma-9b-9b-ul2"
    on_disk, resident = TextEncoderOnDisk.from_pretrained(folder), TextEncoder.from_pretrained(folder)
    assert on_disk.device.type == "meta"
    loads = []
    load = on_disk._load
    monkeypatch.setattr(on_disk, "_load", lambda: loads.append(1) or load())
    with on_disk.loaded() as encoder:
        for prompt in ("One.", "Two.", "One."):
            assert torch.equal(encoder.encode(prompt).hidden, resident.encode(prompt).hidden)
    assert len(loads) == 1
    assert on_disk._loaded is None
    assert torch.equal(on_disk.encode("Two.").hidden, resident.encode("Two.").hidden)
    assert len(loads) == 1  # known
    on_disk.encode("Three.")
    assert len(loads) == 2
    with pytest.raises(InputError), on_disk.loaded() as encoder:
        encoder.encode("")
    assert on_disk._loaded is None
    stored = sum(t.nbytes for t in resident._model.parameters())
    assert TextEncoder.weight_bytes(folder) == stored


def test_threads_share_a_pipeline(captured: MagiHumanPipeline) -> None:
    prompts = [f"Speaker {i} says hello." for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda prompt: captured(prompt, **SMALL), prompts))
    for prompt, result in zip(prompts, together, strict=True):
        assert np.array_equal(captured(prompt, **SMALL).frames, result.frames)


def test_async(captured: MagiHumanPipeline) -> None:
    """Requests are served in their order while the loop goes on; progress arrives in the loop."""
    order: list[tuple[str, str]] = []
    loop_thread = threading.get_ident()

    async def one(prompt: str) -> np.ndarray:
        def report(stage: str, done: int, total: int) -> None:
            assert threading.get_ident() == loop_thread
            order.append((prompt, stage))

        return (await captured.generate_async(prompt, on_step=report, **SMALL)).frames

    async def both() -> list[np.ndarray]:
        return await asyncio.gather(one("First."), one("Second."))

    for prompt, frames in zip(("First.", "Second."), asyncio.run(both()), strict=True):
        assert np.array_equal(frames, captured(prompt, **SMALL).frames)
    stages = ["denoise", "denoise", "decode"]
    assert order == [(prompt, stage) for prompt in ("First.", "Second.") for stage in stages]


def test_async_cancel(captured: MagiHumanPipeline) -> None:
    """Cancelling the task ends the run after its step, and a request that still waits at once."""
    seen: list[int] = []

    async def run() -> None:
        running = asyncio.ensure_future(
            captured.generate_async(
                "One.", on_step=lambda _, done, __: seen.append(done), **SMALL | {"steps": 500}
            )
        )
        while not seen:
            await asyncio.sleep(0.01)
        waiting = asyncio.ensure_future(captured.generate_async("Two.", **SMALL))
        await asyncio.sleep(0)
        for task in (waiting, running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        # The worker is free again: far fewer than 500 steps were taken.
        result = await captured.generate_async("Three.", **SMALL)
        assert len(result.frames) == 25

    asyncio.run(asyncio.wait_for(run(), timeout=60))
    assert len(seen) < 400


def test_async_errors_and_the_callers_event(captured: MagiHumanPipeline) -> None:
    event = threading.Event()
    event.set()
    with pytest.raises(Cancelled):
        asyncio.run(captured.generate_async("Hello.", cancel=event, **SMALL))
    with pytest.raises(InputError, match=r"seconds"):
        asyncio.run(captured.generate_async("Hello.", seconds=99))


def test_cancelled_while_waiting_for_a_turn(captured: MagiHumanPipeline) -> None:
    from magihuman_fast.pipeline.generation import Stages

    lock, event = threading.Lock(), threading.Event()
    stages = Stages(torch.device("cpu"), None, event)
    with lock, ThreadPoolExecutor(1) as thread:

        def wait() -> None:
            with stages.turn(lock):
                pytest.fail("had its turn")

        waiting = thread.submit(wait)
        event.set()
        with pytest.raises(Cancelled, match="cancelled during waiting"):
            waiting.result(timeout=30)
    event.clear()
    with stages.turn(lock):
        assert lock.locked()
    assert not lock.locked()
