"""Measuring one operation: CUDA events, inputs rotated past the cache, medians, ceilings of the same run.

Where there is no GPU the same functions time on the CPU with `time.perf_counter`, and say so.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Protocol

import torch

ROOT = Path(__file__).resolve().parent.parent
Call = Callable[[], object]

LAPS, MIN_LAPS = 21, 3
LAP_SECONDS = 5e-3  # one lap repeats a short operation this long, so that a clock tick is nothing beside it
MAX_CALLS = 400  # in one lap: a captured graph holds all of them
MAX_SECONDS = 3.0  # of laps for one operation, once there are MIN_LAPS


class Stopwatch(Protocol):
    """A way of timing: `prepare` turns work into a lap, a function that runs it and returns its seconds."""

    name: str

    def prepare(self, run: Call) -> Callable[[], float]: ...


class HostStopwatch:
    """Wall-clock time on the host, for work that is done when the call returns."""

    name = "perf_counter"

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def prepare(self, run: Call) -> Callable[[], float]:
        def lap() -> float:
            start = self._now()
            run()
            return self._now() - start

        return lap


class EventStopwatch:
    """CUDA events around launches; the host's gaps between launches count where the device waits for them."""

    name = "CUDA events"

    def prepare(self, run: Call) -> Callable[[], float]:
        def lap() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return lap


class GraphStopwatch:
    """CUDA events around one replay of a graph that holds all launches: the host takes no part in it."""

    name = "CUDA events, graph replay"

    def prepare(self, run: Call) -> Callable[[], float]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        return EventStopwatch().prepare(graph.replay)


def device_stopwatch(device: torch.device | str) -> Stopwatch:
    return GraphStopwatch() if torch.device(device).type == "cuda" else HostStopwatch()


class DeviceTimer:
    """A clock in device seconds for tools that read a clock before and after the work (pytest-benchmark).

    Each reading waits for the device. Intervals are added up in double precision, because an event's own distance is
    float32 milliseconds.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self._last is not None:
            self._seconds += float(self._last.elapsed_time(now)) / 1e3
        self._last = now
        return self._seconds


def cache_bytes(device: torch.device | str) -> int:
    """The device's L2 size; 0 on a CPU, where inputs are not rotated."""
    if torch.device(device).type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def num_copies(nbytes: int, cache: int) -> int:
    """Sets of inputs so that a whole cache of other data passes before one set is used again."""
    return 1 + -(-cache // max(nbytes, 1)) if cache else 1


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over laps and its quartiles."""

    seconds: float
    low: float
    high: float
    laps: int
    calls: int  # in one lap
    copies: int
    clock: str


def measure(
    make: Callable[[], Call],
    *,
    nbytes: int,
    device: torch.device | str = "cpu",
    stopwatch: Stopwatch | None = None,
    cache: int | None = None,
    laps: int = LAPS,
    lap_seconds: float = LAP_SECONDS,
    max_seconds: float = MAX_SECONDS,
) -> Timing:
    """Time what `make` returns. Each `make()` prepares one set of inputs of `nbytes`; the sets are used in turn.

    On a GPU that cannot capture the work in a graph, launches are timed one by one instead; `clock` says which.
    """
    watch = device_stopwatch(device) if stopwatch is None else stopwatch
    copies = num_copies(nbytes, cache_bytes(device) if cache is None else cache)
    calls = [make() for _ in range(copies)]
    for call in calls:  # modules, workspaces and whatever is compiled at first use
        call()

    def rotate(times: int = 1) -> None:
        for _ in range(times):
            for call in calls:
                call()

    try:
        once = watch.prepare(rotate)
    except RuntimeError:
        if not isinstance(watch, GraphStopwatch):
            raise
        watch = EventStopwatch()
        once = watch.prepare(rotate)
    estimate = min(once(), once())
    rotations = max(1, min(int(lap_seconds / max(estimate, 1e-9)), MAX_CALLS // copies))
    lap = once if rotations == 1 else watch.prepare(lambda: rotate(rotations))
    lap()
    times = list(_laps(lap, laps, max_seconds))
    per_call = [seconds / (rotations * copies) for seconds in times]
    low, middle, high = _quartiles(per_call)
    return Timing(middle, low, high, len(times), rotations * copies, copies, watch.name)


def _laps(lap: Callable[[], float], laps: int, max_seconds: float) -> Iterator[float]:
    total = 0.0
    for done in range(laps):
        if done >= MIN_LAPS and total > max_seconds:
            return
        seconds = lap()
        total += seconds
        yield seconds


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


@dataclass(frozen=True)
class Ceilings:
    """What this device reaches in this run: a large copy (bytes read and written) and a large matrix product."""

    copy_bytes: float  # a second
    bf16_flops: float  # a second
    note: str

    def floor(self, flops: int, nbytes: int) -> float:
        """Seconds below which no version of an operation gets: its arithmetic or its bytes, whichever is longer."""
        return max(flops / self.bf16_flops, nbytes / self.copy_bytes)


def measure_ceilings(device: torch.device | str) -> Ceilings:
    """Copy and bf16 matrix product on random data, large enough to fill the device."""
    on_gpu = torch.device(device).type == "cuda"
    size, count = (8192, 1 << 30) if on_gpu else (512, 1 << 22)

    def make_copy() -> Call:
        # Fresh random bytes: the content of a copy costs nothing to choose, and zeros may compress.
        source = torch.randint(-(1 << 31), (1 << 31) - 1, (count // 4,), dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        # By a kernel, as the operations are: in a graph `copy_` is left to the copy engine, which is slower.
        return lambda: torch.bitwise_not(source, out=target)

    def make_product() -> Call:
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b.t(), out=out)

    copy = measure(make_copy, nbytes=2 * count, device=device)
    product = measure(make_product, nbytes=6 * size**2, device=device)
    note = f"copy of {count / 2**20:.0f} MiB, product {size} x {size} x {size}, {product.clock}"
    return Ceilings(2 * count / copy.seconds, 2 * size**3 / product.seconds, note)


@dataclass(frozen=True)
class Result:
    """One measured operation. `variant` is "kernel" or the baseline's name; `peak_share` is the time its operations
    or bytes need at the run's ceilings over the time it took; `speedup` is the baseline's time over its own."""

    op: str
    shape: str
    variant: str
    timing: Timing
    flops: int
    nbytes: int
    device: str
    peak_share: float | None = None
    baseline: str | None = None
    speedup: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Result:
        return cls(**{**values, "timing": Timing(**values["timing"])})

    def with_peak(self, ceilings: Ceilings) -> Result:
        share = ceilings.floor(self.flops, self.nbytes) / self.timing.seconds
        return dataclasses.replace(self, peak_share=share)

    def against(self, other: Result) -> Result:
        ratio = other.timing.seconds / self.timing.seconds
        return dataclasses.replace(self, baseline=other.variant, speedup=ratio)

    def line(self) -> str:
        """`op (shape): us | TFLOP/s | GB/s | % of measured peak | x baseline`"""
        name = self.op if self.variant == "kernel" else f"{self.op}, {self.variant}"
        seconds = self.timing.seconds
        peak = "-" if self.peak_share is None else f"{100 * self.peak_share:.1f} %"
        ratio = "-" if self.speedup is None else f"{self.speedup:.3f} x {self.baseline}"
        values = [
            f"{1e6 * seconds:.1f} us",
            f"{_short(self.flops / seconds / 1e12)} TFLOP/s" if self.flops else "-",
            f"{_short(self.nbytes / seconds / 1e9)} GB/s" if self.nbytes else "-",
            peak,
            ratio,
        ]
        return f"{name} ({self.shape}): {' | '.join(values)}{f' | {self.note}' if self.note else ''}"


def _short(value: float) -> str:
    """At least three significant digits, never an exponent."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


NVIDIA_SMI_FIELDS = (
    "name",
    "driver_version",
    "power.limit",
    "power.draw",
    "temperature.gpu",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks_event_reasons.active",
)


def gpu_state() -> dict[str, str]:
    """What nvidia-smi reports of the first GPU's clocks and power; empty where it cannot be asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
    text = _output(command)
    values = [] if text is None else [value.strip() for value in text.strip().split(",")]
    return dict(zip(NVIDIA_SMI_FIELDS, values, strict=False)) if len(values) == len(NVIDIA_SMI_FIELDS) else {}


def describe_commit(root: Path = ROOT) -> dict[str, Any]:
    """The git commit of `root` and whether tracked files differ from it; commit None outside a repository."""
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit.strip(), "dirty": changes is None or bool(changes.strip())}


def describe_machine() -> dict[str, Any]:
    """Hardware, driver, versions and commit that a measurement belongs to. Reads only; changes no setting."""
    nvcc = re.search(r"release ([\d.]+)", _output(["nvcc", "--version"]) or "")
    machine: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **describe_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": nvcc[1] if nvcc else None,
        "cudnn": torch.backends.cudnn.version(),
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "state": gpu_state(),
        }
    return machine


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
