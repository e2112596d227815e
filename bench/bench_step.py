"""One denoising step, kernel by kernel: time, TFLOP/s, share and gaps beside the floor of this machine.

    python bench/bench_step.py --clip 256p        # on a Hopper GPU: the profiler's view of one graph replay
    python bench/bench_step.py                    # elsewhere: a tiny step of PyTorch operations, timed one by one

The launches that a step makes are known beforehand, in order (`step_launches`), so each kernel that the profiler saw is
paired with its operation, shape and work; what else it saw is told. Floors are the arithmetic or the bytes at the rates
that a large product and a large copy reach in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from kernel_cases import TINY
from magihuman_fast.cli.random_models import random_dit
from magihuman_fast.kernels import ops
from magihuman_fast.model import sampler
from magihuman_fast.model.config import AUDIO_CHANNELS, LATENT_CHANNELS, DiTConfig
from magihuman_fast.model.dit import windowed_layers
from magihuman_fast.runtime.dit import ClipShape, KernelDiT
from magihuman_fast.runtime.graph import StepGraph, StepSpec
from records import default_path, write
from timing import Ceilings, describe_machine, measure_ceilings
from workload import (
    CLIPS,
    FRAME_WINDOW,
    Tokens,
    attention_bytes,
    attention_flops,
    gemm_bytes,
    gemm_flops,
    padded,
)

KINDS: tuple[Any, ...] = ("renoise", "unipc")
# What tells an operation's kernel by its name, where it is not called as the operation is: products share one kernel.
KERNEL_NAMES = {
    "gemm_qkv": "QkvEpilogue",
    "gemm_residual": "ResidualEpilogue",
    "gemm_gelu7": "Gelu7",
    "gemm_swiglu7": "Swiglu7Epilogue",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a step: operation, shape in words, and the work it cannot do without."""

    op: str
    shape: str
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Timed:
    """A launch as it ran: seconds, and the seconds from the end of the launch before to its start."""

    launch: Launch
    seconds: float
    gap: float


Event = tuple[str, float, float]
"""What ran on the device: name, start and end in seconds."""


def step_launches(config: DiTConfig, clip: Tokens, spec: StepSpec) -> list[Launch]:
    """Every launch of one step, in order."""
    h, rows = config.hidden_size, clip.rows
    latents = 4 * (prod(clip.latent) + clip.audio * AUDIO_CHANNELS)
    embedders = config.video_in_channels * clip.video + config.audio_in_channels * clip.audio
    forward = [Launch("embed", f"{rows} rows", 2 * h * embedders, latents + 4 * h * (rows + clip.text))]
    for i in range(config.num_layers):
        last = i == config.num_layers - 1
        m = clip.video + clip.audio if last else rows
        groups = 3 if config.is_mm(i) else 1
        width, gelu = padded(config.intermediate(i)), config.is_gelu(i)
        up = config.intermediate(i) * (1 if gelu else 2)
        window = spec.frame_window if i in config.local_attn_layers else None
        experts = "3 experts" if groups == 3 else "1 expert"

        def norm(m: int) -> Launch:
            return Launch("rms_norm", f"{m} rows", 0, 6 * m * h)

        def product(
            op: str, m: int, n: int, k: int, per_row: int, groups: int = groups, e: str = experts
        ) -> Launch:
            return Launch(
                op, f"{m} x {n} x {k}, {e}", gemm_flops(m, n, k), gemm_bytes(m, n, k, groups, per_row)
            )

        pairs = attention_flops(config, clip, window) * (m if window is None else rows) // rows
        forward += [
            norm(rows),
            product("gemm_qkv", rows, config.qkvg_rows, h, 2 * config.qkvg_rows + 4 * config.rotary_dim),
            Launch(
                "gated_attention",
                f"{m} x {rows}" + ("" if window is None else f", within {window} frames"),
                pairs,
                attention_bytes(config, clip),
            ),
            product("gemm_residual", m, h, h, 8 * h),
            norm(m),
            product("gemm_gelu7" if gelu else "gemm_swiglu7", m, up, h, 2 * width),
            product("gemm_residual", m, h, width, 8 * h),
        ]
    out = clip.video * config.video_in_channels + clip.audio * config.audio_in_channels
    forward.append(
        Launch("head", f"{clip.video + clip.audio} rows", 2 * h * out, 4 * (h * (rows - clip.text) + out))
    )
    update = "renoise_step" if spec.kind == "renoise" else "unipc_step"
    tensors = (4 if spec.kind == "renoise" else 8) + spec.guided
    sizes = (("video", 4 * prod(clip.latent)), ("audio", 4 * clip.audio * AUDIO_CHANNELS))
    image = 8 * LATENT_CHANNELS * prod(clip.latent[2:])
    launches = [Launch("clamp_image", "frame 0", 0, image), *forward * (2 if spec.guided else 1)]
    for name, nbytes in sizes:
        launches += [Launch(update, name, 0, tensors * nbytes), Launch("advance_step", name, 0, 8)]
    return [*launches, Launch("keep_frame", "frame 0", 0, image)]


@contextmanager
def recorded(seen: list[Event]) -> Iterator[None]:
    """While this lasts, every operation adds its name, start and end to `seen`: for backends whose calls wait."""
    names = {launch.op for kind in KINDS for launch in step_launches(TINY.config, TINY.clip, toy_spec(kind))}
    replaced = [(ops, name, name, getattr(ops, name)) for name in names if hasattr(ops, name)]
    replaced.append((torch, "where", "keep_frame", torch.where))

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            if name != "keep_frame" or "out" in options:
                seen.append((name, start, time.perf_counter()))
            return result

        return call

    try:
        for module, attribute, name, function in replaced:
            setattr(module, attribute, wrap(name, function))
        yield
    finally:
        for module, attribute, _, function in replaced:
            setattr(module, attribute, function)


def profiled(graph: StepGraph) -> list[Event]:
    """What the profiler saw on the device in one replay, by start; copies and fills too."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    return [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in kernels]


def is_kernel_of(op: str, name: str) -> bool:
    """Whether a kernel's name, or what `recorded` calls it, is that of an operation."""
    return name == op or KERNEL_NAMES.get(op, f"{op}_sm90") in name


def is_torch_kernel(name: str) -> bool:
    return name == "keep_frame" or not ("_sm90" in name or name.startswith(("Memcpy", "Memset")))


def next_of(launch: Launch, seen: Sequence[Event], first: int) -> int | None:
    """Where in `seen`, from `first` on, this launch is. Torch's own kernel has a name that may change."""
    rest = range(first, len(seen))
    if launch.op != "keep_frame":
        return next((i for i in rest if is_kernel_of(launch.op, seen[i][0])), None)
    likely = next((i for i in rest if "where" in seen[i][0].lower()), None)
    return next((i for i in rest if is_torch_kernel(seen[i][0])), None) if likely is None else likely


def paired(launches: Sequence[Launch], seen: Sequence[Event]) -> tuple[list[Timed], list[Event]]:
    """Each launch with its time, in order and by name, and the events between them that are no launch of the step.

    Raises:
        ValueError: the profiler did not see all launches, or not in their order.
    """
    found: list[Timed] = []
    others: list[Event] = []
    first = 0
    for number, launch in enumerate(launches):
        at = next_of(launch, seen, first)
        if at is None:
            odd = next((name for name, _, _ in [*others, *seen[first:]]), "nothing more")
            raise ValueError(
                f"step: expected {launch.op} ({launch.shape}), launch {number + 1} of {len(launches)}, in its "
                f"place; of {len(seen)} events the profiler saw none; the first without a launch is {odd}"
            )
        others += seen[first:at]
        _, start, end = seen[at]
        before = seen[first - 1][2] if found else start
        found.append(Timed(launch, end - start, start - before))
        first = at + 1
    return found, [*others, *seen[first:]]


def table(timed: Sequence[Timed], ceilings: Ceilings) -> list[str]:
    """Equal launches together, the longest first: count, microseconds each, TFLOP/s, share, floor; and the gaps."""
    total = sum(t.seconds + t.gap for t in timed)
    groups: dict[tuple[str, str], list[Timed]] = {}
    for t in timed:
        groups.setdefault((t.launch.op, t.launch.shape), []).append(t)
    lines = [
        f"{'operation':<58} {'count':>5} {'us':>10} {'TFLOP/s':>8} {'share':>7} {'floor us':>9} {'x floor':>8}"
    ]
    floors = 0.0
    for (op, shape), group in sorted(groups.items(), key=lambda item: -sum(t.seconds for t in item[1])):
        seconds = sum(t.seconds for t in group) / len(group)
        launch = group[0].launch
        floor = ceilings.floor(launch.flops, launch.nbytes)
        floors += floor * len(group)
        rate = f"{launch.flops / seconds / 1e12:.1f}" if launch.flops and seconds else ""
        share = 100 * seconds * len(group) / total
        lines.append(
            f"{f'{op} ({shape})':<58} {len(group):>5} {1e6 * seconds:>10.1f} {rate:>8} {share:>6.1f}% "
            f"{1e6 * floor:>9.1f} {seconds / floor if floor else 0:>8.2f}"
        )
    gaps = sum(t.gap for t in timed)
    lines.append(
        f"step: {1e3 * total:.3f} ms, floor {1e3 * floors:.3f} ms, gaps {100 * gaps / total:.1f} % of it; "
        f"{len(timed)} launches; ceilings: {ceilings.note}"
    )
    return lines


def toy_spec(kind: Any) -> StepSpec:
    return StepSpec(shape_of(TINY.clip), kind, guided=kind == "unipc", max_steps=8)


def shape_of(clip: Tokens) -> ClipShape:
    frames, height, width = clip.latent[1:]
    return ClipShape(frames, height, width, clip.audio)


def spec_of(name: str) -> StepSpec:
    """The step that runs at a clip's size: the distilled first stage, or super-resolution."""
    shape = shape_of(CLIPS[name])
    if name == "256p":
        return StepSpec.first_stage(shape, guided=False, steps=8)
    return StepSpec.super_resolution(
        shape, guided=False, frame_window=FRAME_WINDOW if name == "1080p" else None
    )


def begin(graph: StepGraph, clip: Tokens) -> None:
    """Fill the step's buffers with random data."""
    device, config = graph.dit.device, graph.dit.config
    latents = torch.randn(clip.latent, device=device), torch.randn(clip.audio, AUDIO_CHANNELS, device=device)
    texts = [torch.randn(clip.text, config.text_in_channels, device=device) for _ in graph.prompts]
    options: dict[str, Any] = {"sigmas": sampler.flow_sigmas(8), "coords": "v1"}
    if graph.spec.kind == "renoise":
        options["noise"] = [tuple(map(torch.randn_like, latents)) for _ in range(8)]
    if graph.spec.guided:
        options["guidance"] = (torch.ones(1), torch.ones(1))
    graph.begin(*latents, texts, **options)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One denoising step, kernel by kernel.")
    parser.add_argument("--clip", choices=[*CLIPS], default="256p", help="default: 256p")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default on a GPU: in bench/results/step")
    args = parser.parse_args(argv)
    on_gpu = ops.gpu_unavailable() is None
    device: str = "cuda" if on_gpu else "cpu"
    if on_gpu:
        clip, spec, config = CLIPS[args.clip], spec_of(args.clip), DiTConfig()
        if args.clip == "1080p":
            config = dataclasses.replace(config, local_attn_layers=windowed_layers(config.num_layers))
    else:
        print(
            f"{ops.gpu_unavailable()}: a tiny step of PyTorch operations; no figures of the model", flush=True
        )
        clip, spec, config = TINY.clip, toy_spec("renoise"), TINY.config
    graph = StepGraph(
        KernelDiT(random_dit(config, device=device), backend="gpu" if on_gpu else "reference"), spec
    )
    if graph.capture_seconds is not None:
        print(f"captured in {graph.capture_seconds:.3f} s", flush=True)
    ceilings = measure_ceilings(device)
    begin(graph, clip)
    graph.replay()
    if on_gpu:
        seen = profiled(graph)
    else:
        seen = []
        with recorded(seen):
            graph.replay()
    machine = describe_machine()
    kept = default_path(machine)
    path = args.out or (kept.parent / "step" / f"{args.clip}-{kept.name}" if on_gpu else None)
    record = {"machine": machine, "clip": clip.name, "capture_seconds": graph.capture_seconds}
    record |= {"ceilings": dataclasses.asdict(ceilings), "events": seen}
    try:
        timed, others = paired(step_launches(config, clip, spec), seen)
        record |= {"launches": [dataclasses.asdict(t) for t in timed], "others": others}
        print("\n".join(table(timed, ceilings)))
        for name, start, end in others:
            print(f"no launch of the step: {name}, {1e6 * (end - start):.1f} us")
    except ValueError as error:
        # What was seen is kept: it cannot be had again without the machine.
        record["error"] = str(error)
        raise
    finally:
        if path is not None:
            write(path, record)
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
