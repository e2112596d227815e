"""Which CUDA streams are used for what: nothing but captures may run on the stream that graphs are captured on."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import magihuman_fast
from dit_cases import kernel_model
from magihuman_fast.kernels import launch
from magihuman_fast.kernels.launch import capture_graph, side_stream
from magihuman_fast.runtime import graph as step_graphs
from magihuman_fast.runtime import turbo_vae
from magihuman_fast.runtime.decode_plan import REGIONS
from magihuman_fast.runtime.dit import ClipShape
from magihuman_fast.runtime.graph import StepGraph, StepSpec
from magihuman_fast.runtime.turbo_vae import Workspace

POOL = 32  # streams that torch has for each device and priority
MANY = 40
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


class FakeCuda:
    """What captures use of `torch.cuda`: streams from pools as torch's, and what was captured where."""

    def __init__(self) -> None:
        self.made: Counter[tuple[int, int]] = Counter()
        self.captured: list[Any] = []
        self.device = 0
        self.current: Any = "the caller's stream"

    def stream(self, device: torch.device, priority: int = 0) -> SimpleNamespace:
        pool = (device.index, priority)
        self.made[pool] += 1
        return SimpleNamespace(priority=priority, cuda_stream=(*pool, self.made[pool] % POOL))

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        yield
        self.device = before

    @contextmanager
    def on_stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: object, *, stream: Any, capture_error_mode: str) -> Iterator[None]:
        """As torch's, which stays on its stream when the capture failed."""
        assert launch._one_capture_at_a_time.locked()
        assert capture_error_mode == "thread_local"
        before, self.current = self.current, stream
        yield
        self.captured.append(stream)
        self.current = before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name, value in {
        "Stream": fake.stream,
        "CUDAGraph": object,
        "graph": fake.graph,
        "device": fake.on_device,
        "stream": fake.on_stream,
        "current_device": lambda: fake.device,
        "current_stream": lambda device: fake.current,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(launch, "_capture_streams", {})
    return fake


def test_captures_share_one_stream_that_serves_nothing_else(cuda: FakeCuda) -> None:
    seen = []
    others = []
    for _ in range(MANY):
        capture_graph(lambda: seen.append(cuda.current), FIRST)
        others += [side_stream(FIRST), cuda.stream(FIRST)]
    assert cuda.captured == seen
    assert all(stream is cuda.captured[0] for stream in cuda.captured)
    handles = {stream.cuda_stream for stream in others}
    assert len(handles) == 2 * POOL  # all that there are of those priorities
    assert cuda.captured[0].cuda_stream not in handles
    assert cuda.current == "the caller's stream"


def test_each_device_has_its_own_capture_stream(cuda: FakeCuda) -> None:
    for device in (FIRST, SECOND, FIRST, SECOND):
        capture_graph(lambda: None, device)
    assert [stream.cuda_stream[0] for stream in cuda.captured] == [0, 1, 0, 1]
    assert cuda.captured[:2] == cuda.captured[2:]


def test_captures_of_several_threads_share_it_too(cuda: FakeCuda) -> None:
    threads = [threading.Thread(target=capture_graph, args=(lambda: None, FIRST)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(cuda.captured) == 4
    assert all(stream is cuda.captured[0] for stream in cuda.captured)


def test_a_capture_that_fails_does_not_keep_its_stream(cuda: FakeCuda) -> None:
    def fail() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture_graph(fail, FIRST)
    assert cuda.current == "the caller's stream"
    capture_graph(lambda: None, FIRST)
    assert cuda.made == {(0, cuda.captured[0].priority): 1}


def test_a_step_is_warmed_up_on_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched on the capture stream, the warm-up could become part of what another thread captures there."""
    # Of one latent frame: on the host offsets are checked against the latents' sizes.
    step = StepGraph(kernel_model("sim"), StepSpec(ClipShape(1, 4, 6, 1), "renoise", max_steps=8))
    events: list[object] = []
    take = step._step

    def stay(*_: object) -> None:
        pytest.fail("the warm-up left the caller's stream")

    def capture(run: Callable[[], object], device: torch.device) -> SimpleNamespace:
        events.append((run, device))
        return SimpleNamespace(replay=lambda: events.append("replayed"))

    def count_step() -> None:
        events.append("launched")
        take()

    monkeypatch.setattr(step, "_step", count_step)
    monkeypatch.setattr(step_graphs, "capture_graph", capture)
    monkeypatch.setattr(torch.cuda, "stream", stay)
    monkeypatch.setattr(torch.cuda, "set_stream", stay)
    step._capture()
    step.replay()
    assert events == ["launched", (count_step, torch.device("cpu")), "replayed"]
    assert step.capture_seconds is not None


def test_a_decoder_copies_on_a_side_stream(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(turbo_vae.torch, "empty", lambda *a, device, **k: empty(*a, **k))
    space = Workspace(dict.fromkeys(REGIONS, 2), (1, 16, 16, 3), FIRST)
    assert space.copy_stream.priority == side_stream(FIRST).priority != 0
    assert set(cuda.made) == {(0, space.copy_stream.priority)}


def test_streams_are_made_in_one_place() -> None:
    package = Path(magihuman_fast.__file__).parent
    makers = [path.name for path in package.rglob("*.py") if "cuda.Stream(" in path.read_text("utf-8")]
    assert makers == ["launch.py"]


# --- on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_capture_stream_is_none_of_many_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x, handles = torch.zeros(1, device=device), set()

    def run() -> None:
        handles.add(torch.cuda.current_stream(device).cuda_stream)
        x.add_(1)

    run()
    handles.clear()
    ours = torch.cuda.current_stream(device)
    others = set()
    for _ in range(MANY):
        others |= {side_stream(device).cuda_stream, torch.cuda.Stream(device).cuda_stream}
        graph = capture_graph(run, device)
    assert len(handles) == 1
    assert len(others) == 2 * POOL
    assert not handles & others
    assert torch.cuda.current_stream(device) == ours
    assert x.item() == 1
    graph.replay()
    assert x.item() == 2


@pytest.mark.gpu
def test_launches_on_many_streams_stay_out_of_a_capture_on_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    x, others = torch.zeros(1, device=device), [torch.zeros(1, device=device) for _ in range(MANY)]
    streams = [torch.cuda.Stream(device, priority=-(i % 2)) for i in range(MANY)]
    torch.cuda.synchronize()
    capturing, launched = threading.Event(), threading.Event()

    def launch_elsewhere() -> None:
        capturing.wait()
        for stream, other in zip(streams, others, strict=True):
            with torch.cuda.stream(stream):
                other.add_(1)
        launched.set()

    def run() -> None:
        capturing.set()
        launched.wait()
        x.add_(1)

    x.add_(1)
    thread = threading.Thread(target=launch_elsewhere)
    thread.start()
    graph = capture_graph(run, device)
    thread.join()
    torch.cuda.synchronize()
    assert [other.item() for other in others] == [1] * MANY
    graph.replay()
    torch.cuda.synchronize()
    assert (x.item(), [other.item() for other in others]) == (2, [1] * MANY)


@pytest.mark.gpu
def test_a_pipelines_side_stream_on_a_gpu() -> None:
    pytest.importorskip("diffusers")
    from magihuman_fast.cli.random_models import random_pipeline

    handles: set[int] = set()
    pipes = [random_pipeline("tiny", device="cuda") for _ in range(2)]
    x = torch.zeros(1, device="cuda")
    x.add_(1)

    def run() -> None:
        handles.add(torch.cuda.current_stream().cuda_stream)
        x.add_(1)

    capture_graph(run, x.device)
    assert handles.isdisjoint(pipe._side.cuda_stream for pipe in pipes if pipe._side is not None)
    assert all(pipe._side is not None and pipe._side.priority < 0 for pipe in pipes)
