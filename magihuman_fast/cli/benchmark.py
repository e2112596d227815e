"""How long everything takes: cold start, each stage warm, and the compiled reference path in the same run.

Weights are random unless a checkpoint is named: speed and memory are those of the published sizes, pictures are noise.
On a machine without a Hopper GPU this measures the reference path, at a toy size unless told otherwise, and says so.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checkpoints.loading import resolve_device
from ..errors import InputError, InsufficientMemory
from ..guards.child_process import end_with_parent, tied
from ..guards.number_checks import as_integer, value_text
from ..model.config import TURBO_VAE_FOLDER
from ..pipeline.pipeline import MagiHumanPipeline
from ..runtime.turbo_vae import TurboVAE
from .random_models import random_pipeline, random_turbo_vae

log = logging.getLogger(__name__)

PRESETS: dict[str, str | None] = {"256p": None, "540p": "540p", "1080p": "1080p"}
# Seconds after text encoding that bfloat16 is to reach on one H200 (docs/performance.md).
TARGETS = {"256p": 1.35, "540p": 5.8, "1080p": 31.0}
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
RECOMPILE_LIMIT = 64  # more kinds of layers and lengths of prompts than a clip has; torch's own is 8
TOY: dict[str, Any] = {"seconds": 1, "width": 64, "height": 64, "steps": 2}


@dataclass(frozen=True)
class Setting:
    """What to measure, and on what."""

    presets: tuple[str, ...] = ("256p",)
    model: Path | None = None  # a checkpoint; None: random weights
    size: str = "full"  # of random weights
    variant: str = "distill"
    runs: int = 3
    device: str = "auto"
    baseline: bool = True
    cold: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.presets if name not in PRESETS]
        if unknown or not self.presets:
            raise InputError(f"presets: expected some of {', '.join(PRESETS)}, got {list(self.presets)}")
        runs = as_integer(self.runs)
        if runs is None or runs < 1:
            raise InputError(f"runs: expected a positive integer, got {value_text(self.runs)}")
        object.__setattr__(self, "runs", runs)  # the record is written as JSON

    def request(self, preset: str) -> dict[str, Any]:
        """The arguments of one clip: 5 seconds of 448x256, or a toy."""
        if self.size != "tiny":
            return {"seconds": 5}
        return TOY if PRESETS[preset] is None else {**TOY, "sr_steps": 1, "sr_size": (64, 96)}

    def load(self, preset: str) -> MagiHumanPipeline:
        sr = PRESETS[preset]
        if self.model is not None:
            return MagiHumanPipeline.from_pretrained(
                self.model, variant=self.variant, sr=sr, device=self.device
            )
        device = resolve_device(self.device)
        return random_pipeline(self.size, variant=self.variant, sr=sr, device=device)

    def reference_decoder(self, pipe: MagiHumanPipeline) -> TurboVAE:
        """The video decoder of `pipe` in PyTorch."""
        if pipe.turbo_vae.backend == "reference":
            return pipe.turbo_vae
        options: dict[str, Any] = {
            "device": pipe.device,
            "dtype": pipe.turbo_vae.dtype,
            "backend": "reference",
        }
        if self.model is not None:
            return TurboVAE.from_pretrained(self.model / TURBO_VAE_FOLDER, **options)
        return random_turbo_vae(self.size, **options)


@dataclass(frozen=True)
class Measurement:
    """One preset on one path. Seconds; `stages` are medians over the runs, `after_text` is all but text encoding."""

    preset: str
    path: str
    reason: str
    size: tuple[int, int]  # width, height of the clip
    load: float
    setup: float  # capture, or of the baseline compilation
    first: float  # the first clip
    stages: dict[str, float]
    after_text: float
    runs: int
    peak_bytes: int | None  # of the GPU


@dataclass(frozen=True)
class Unfit:
    """A path on which a preset does not fit into the device's memory, and what was said of it."""

    preset: str
    path: str
    reason: str


def measure(setting: Setting, report: Callable[[str], object] = log.info) -> Iterator[Measurement | Unfit]:
    """Every preset in turn, and beside each the baseline where it is asked for; each as it is found."""
    for preset in setting.presets:
        for found in _measure_preset(setting, preset):
            report(line(found))
            yield found
        # Nothing of a preset is in use here; what refers to itself goes too before the next is loaded.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _measure_preset(setting: Setting, preset: str) -> Iterator[Measurement | Unfit]:
    start = time.perf_counter()
    pipe = setting.load(preset)
    load = time.perf_counter() - start
    request = setting.request(preset)
    path = (pipe.engine.path.name, pipe.engine.path.reason)
    yield _measure(pipe, preset, path, load, partial(set_up, pipe, request), request, setting.runs)
    if setting.baseline:
        yield _measure_baseline(setting, pipe, preset, load, request)


def _measure_baseline(
    setting: Setting, pipe: MagiHumanPipeline, preset: str, load: float, request: dict[str, Any]
) -> Measurement | Unfit:
    how = "compiled by torch" if pipe.device.type == "cuda" else "traced by torch"
    path = (f"reference path, {how}", "baseline")
    # A step of each stage meets every shape there is.
    short = request | {"steps": 1} | ({"sr_steps": 1} if pipe.sr else {})
    pipe.engine.make_room(0)
    pipe.turbo_vae.drop_buffers()
    try:
        with compiled_reference(pipe, setting.reference_decoder(pipe)) as plain:
            compile_it = partial(plain, prompt(0), **short)
            return _measure(plain, preset, path, load, compile_it, request, setting.runs)
    except (InsufficientMemory, torch.OutOfMemoryError) as error:
        return Unfit(preset, path[0], str(error))


def set_up(pipe: MagiHumanPipeline, request: dict[str, Any]) -> None:
    """Capture what the request's clip needs."""
    options = {name: request[name] for name in ("seconds", "steps", "sr_size") if name in request}
    pipe.setup([(request.get("width", 448), request.get("height", 256))], **options)


def _measure(
    pipe: MagiHumanPipeline,
    preset: str,
    path: tuple[str, str],
    load: float,
    setup: Callable[[], object],
    request: dict[str, Any],
    runs: int,
) -> Measurement:
    on_gpu = pipe.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(pipe.device)
    start = time.perf_counter()
    setup()
    ready = time.perf_counter()
    result = pipe(prompt(0), **request)
    first = time.perf_counter() - ready
    timings = [pipe(prompt(1 + i), **request).timings for i in range(runs)]
    stages = {stage: median(t[stage] for t in timings) for stage in timings[0]}
    return Measurement(
        preset,
        *path,
        (result.frames.shape[2], result.frames.shape[1]),
        load,
        ready - start,
        first,
        stages,
        median(t["total"] - t["text"] for t in timings),
        runs,
        torch.cuda.max_memory_allocated(pipe.device) if on_gpu else None,
    )


def prompt(take: int) -> str:
    """A prompt of its own for each run, because known ones are not encoded again; all of one length, because what
    torch has compiled serves no other."""
    return f"A woman looks into the camera and says hello. Take {chr(ord('A') + take % 26)}."


@contextmanager
def compiled_reference(pipe: MagiHumanPipeline, decoder: TurboVAE) -> Iterator[MagiHumanPipeline]:
    """The reference path with the same weights: layers compiled by torch, cuDNN's attention where it takes them, and
    `decoder`, the PyTorch one.

    Layers are compiled without their numbers, once for each kind. On a CPU they are traced but not compiled: a C++
    compiler would take longer than everything else. More kinds than torch may compile are an error: it would run the
    rest as they are, and this would be no baseline.
    """
    on_gpu = pipe.device.type == "cuda"
    options: dict[str, Any] = {"mode": "max-autotune-no-cudagraphs"} if on_gpu else {"backend": "eager"}
    models = [dit for dit in (pipe.dit, pipe.sr_dit) if dit is not None]
    torch._dynamo.reset()
    for dit in models:
        vars(dit)["apply_layer"] = torch.compile(dit.apply_layer, dynamic=False, **options)
    limit = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True)
    attention = sdpa_kernel(PRIORITY, set_priority=True) if on_gpu else contextlib.nullcontext()
    try:
        with limit, attention:
            yield MagiHumanPipeline(
                dit=pipe.dit,
                variant=pipe.variant,
                turbo_vae=decoder,
                audio_vae=pipe.audio_vae,
                text_encoder=pipe.text_encoder,
                image_encoder=pipe.image_encoder,
                sr_dit=pipe.sr_dit,
                sr=pipe.sr,
                kernels=False,
            )
    finally:
        for dit in models:
            del vars(dit)["apply_layer"]
        torch._dynamo.reset()  # what is compiled goes with the models it was compiled for


def line(m: Measurement | Unfit) -> str:
    """One preset in one line."""
    if isinstance(m, Unfit):
        return unfit_line(asdict(m))
    stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in m.stages.items() if stage != "total")
    peak = "" if m.peak_bytes is None else f", peak {m.peak_bytes / 1e9:.1f} GB"
    return (
        f"{m.preset} {m.size[0]}x{m.size[1]}, {m.path}: {m.after_text:.3f} s after text ({stages}); load {m.load:.2f}, "
        f"set-up {m.setup:.2f}, first clip {m.first:.2f}{peak}"
    )


def unfit_line(m: dict[str, Any]) -> str:
    return f"{m['preset']}, {m['path']}: does not fit: {m['reason']}"


def run(
    setting: Setting,
    report: Callable[[str], object] = log.info,
    keep: Callable[[dict[str, Any]], object] | None = None,
) -> dict[str, Any]:
    """Everything that is asked for, as plain values; each line is told to `report` as it is found.

    `keep` is given the record so far after each thing that is found, so that what stops a run leaves what was found.
    """
    record: dict[str, Any] = {"setting": asdict(setting) | {"model": setting.model and str(setting.model)}}
    record["toy"] = setting.size != "full"
    if record["toy"]:
        report(f"size {setting.size}: this exercises the code and measures no model")
    record |= {"cold": {}, "warm": [], "unfit": []}
    keep = keep or (lambda _: None)
    for preset in setting.presets if setting.cold else ():
        parts = record["cold"][preset] = cold_start(setting, preset)
        report(f"{preset} cold start: " + ", ".join(f"{name} {s:.2f}" for name, s in parts.items()))
        keep(record)
    for found in measure(setting, report):
        record["unfit" if isinstance(found, Unfit) else "warm"].append(asdict(found))
        keep(record)
    return record


def rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """The record as a table: presets and paths across, seconds of stages down; last, memory."""
    warm = record["warm"]

    def row(name: str, cell: Callable[[dict[str, Any]], str]) -> tuple[str, ...]:
        return (name, *map(cell, warm))

    def seconds(stage: str) -> Callable[[dict[str, Any]], str]:
        return lambda m: f"{m['stages'][stage]:.3f}" if stage in m["stages"] else ""

    def gigabytes(m: dict[str, Any]) -> str:
        return "" if m["peak_bytes"] is None else f"{m['peak_bytes'] / 1e9:.1f}"

    stages = [stage for stage in dict.fromkeys(s for m in warm for s in m["stages"]) if stage != "total"]
    return [
        row("", lambda m: f"{m['preset']}, {m['path']}"),
        *(row(stage, seconds(stage)) for stage in stages),
        row("after text", lambda m: f"{m['after_text']:.3f}"),
        # Beside toys a target would say nothing.
        *([] if record["toy"] else [row("target on an H200", lambda m: f"{TARGETS[m['preset']]:.3f}")]),
        row("load", lambda m: f"{m['load']:.2f}"),
        row("set-up", lambda m: f"{m['setup']:.2f}"),
        row("first clip", lambda m: f"{m['first']:.2f}"),
        row("peak GB", gigabytes),
    ]


def notes(record: dict[str, Any]) -> list[str]:
    """What goes with the table: cold starts, what did not fit, and that toys are toys."""
    lines = [
        f"cold start to first frames, {preset}: " + ", ".join(f"{n} {s:.2f}" for n, s in parts.items())
        for preset, parts in record["cold"].items()
    ]
    lines += map(unfit_line, record["unfit"])
    toy = "small pictures, maybe toy weights: these are no figures of the model, and no target applies"
    return lines + ([toy] if record["toy"] else [])


# --- cold start -----------------------------------------------------------------------------------------------


def cold_start(setting: Setting, preset: str) -> dict[str, float]:
    """Seconds from the start of a process to a clip's first frames, in parts: a fresh process measures itself."""
    values = asdict(setting) | {"model": None if setting.model is None else str(setting.model)}
    code = f"import sys, time; begun = time.time(); from {__name__} import start_cold; start_cold(begun)"
    command = [sys.executable, "-c", code, json.dumps(values), preset]
    with tied() as stdin:
        begun = time.time()
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cold start: the process failed: {done.stderr.strip()[-500:]}")
    marks: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    names = ("interpreter", "import", "load", "set-up", "first frames")
    times = [begun, *(marks[name] for name in names)]
    parts = {name: after - before for name, before, after in zip(names, times, times[1:], strict=False)}
    return parts | {"total": times[-1] - begun}


def start_cold(started: float) -> None:
    """What the fresh process does: load, set up, run until the first frames are there, print when each was done."""
    end_with_parent()
    values, preset = json.loads(sys.argv[1]), sys.argv[2]
    model = values.pop("model")
    setting = Setting(
        **values | {"presets": tuple(values["presets"])}, model=None if model is None else Path(model)
    )
    marks = {"interpreter": started, "import": time.time()}
    pipe, request = setting.load(preset), setting.request(preset)
    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)
    marks["load"] = time.time()
    set_up(pipe, request)
    marks["set-up"] = time.time()

    def told(stage: str, done: int, total: int) -> None:
        if stage == "decode" and done == 1:
            marks["first frames"] = time.time()

    pipe(prompt(0), on_step=told, **request)
    print(json.dumps(marks))
