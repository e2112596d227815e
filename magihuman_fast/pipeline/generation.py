"""One run of the pipeline: its stages, what runs beside them, and what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np
import torch

from ..codecs import media
from ..errors import Cancelled, InputError
from ..guards.file_paths import PathLike
from ..model import config
from .request import Request

T = TypeVar("T")
OnStep = Callable[[str, int, int], object]
POLL_SECONDS = 0.05  # how often a run that waits for its turn looks whether it was cancelled


class CancelEvent(Protocol):
    """What `cancel` must offer; `threading.Event` does."""

    def is_set(self) -> bool: ...


class EitherEvent(Event):
    """Set when it was set itself, or when the caller's own event is."""

    def __init__(self, other: CancelEvent | None) -> None:
        super().__init__()
        self._other = other

    def is_set(self) -> bool:
        return super().is_set() or (self._other is not None and self._other.is_set())


@dataclass(frozen=True)
class GenerationResult:
    """One generated clip.

    frames: uint8 (F, H, W, 3) at `fps`. audio: float32 (n, 2) at `sample_rate`. timings: seconds per stage, and
    "total"; what runs beside other stages on a GPU is in no sum.
    """

    frames: np.ndarray
    audio: np.ndarray
    timings: Mapping[str, float]
    seed: int
    fps: int = config.FPS
    sample_rate: int = config.SAMPLE_RATE

    def save(self, path: PathLike) -> None:
        """Write an mp4 with sound; the shorter of picture and sound sets the length.

        Raises:
            OutputError: the file cannot be written; nothing is left behind.
        """
        media.write_video(path, self.frames, self.audio, fps=self.fps, sample_rate=self.sample_rate)


class Stages:
    """Names and times the stages of one run, and carries progress and cancellation."""

    def __init__(self, device: torch.device, on_step: OnStep | None, cancel: CancelEvent | None) -> None:
        if on_step is not None and not callable(on_step):
            raise InputError(f"on_step: expected a function, got {type(on_step).__name__}")
        if cancel is not None and not callable(getattr(cancel, "is_set", None)):
            raise InputError(f"cancel: expected an event with is_set(), got {type(cancel).__name__}")
        self.timings: dict[str, float] = {}
        self._device, self._on_step, self._cancel = device, on_step, cancel

    def check(self, stage: str) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled(f"cancelled during {stage}")

    def reporter(self, stage: str) -> Callable[[int, int], None]:
        """A callback (done, total) for one stage that reports progress, then honours cancellation."""

        def report(done: int, total: int) -> None:
            if self._on_step is not None:
                self._on_step(stage, done, total)
            self.check(stage)

        return report

    @contextmanager
    def turn(self, lock: Lock) -> Iterator[None]:
        """Hold `lock`; a run that is cancelled while it waits for it ends."""
        while not lock.acquire(timeout=POLL_SECONDS):
            self.check("waiting")
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.check(stage)
        start = time.perf_counter()
        yield
        if self._device.type == "cuda":
            # This stream, not the device: what runs beside it is not part of the stage.
            torch.cuda.current_stream(self._device).synchronize()
        self.timings[stage] = time.perf_counter() - start


@dataclass(frozen=True)
class Job:
    """A request that was checked, with its picture and sound loaded."""

    request: Request
    prompts: list[str]  # and the negative prompt, where something is guided
    pixels: tuple[torch.Tensor | None, torch.Tensor | None]  # the reference image for either stage
    waveform: torch.Tensor | None
    seconds: float  # that the clip covers
    seed: int
    sr_guidance: bool
    stages: Stages


class Beside:
    """Runs work beside the main stream of a GPU, in a thread and on `stream`; without one, as on a CPU, at once.

    The block that it is used as waits for all of it. The stream is the caller's, because torch keeps memory for every
    stream that has ever allocated.
    """

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._stream = stream
        self._thread = None if stream is None else ThreadPoolExecutor(1)

    def __enter__(self) -> Beside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def start(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin `work`, which sees everything queued so far; the function that waits for it and gives its result."""
        if self._thread is None or self._stream is None:
            done = work()
            return lambda: done
        queued = torch.cuda.Event()
        queued.record(torch.cuda.current_stream(self._stream.device))
        future: Future[T] = self._thread.submit(self._run, work, queued)

        def result() -> T:
            found = future.result()
            if isinstance(found, torch.Tensor) and found.is_cuda:
                # It was allocated on the other stream, where nothing would keep its memory until this one is done.
                found.record_stream(torch.cuda.current_stream(found.device))
            return found

        return result

    @torch.no_grad()
    def _run(self, work: Callable[[], T], queued: torch.cuda.Event) -> T:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(queued)
            try:
                return work()
            finally:
                # Also of work that failed: what it has launched may still read the other stream's tensors.
                self._stream.synchronize()
