"""Speed and loading of the reference path on this machine's CPU, against bounds that must hold.

    python bench/bench_reference.py [--threads N] [--rounds N] [--json FILE]

Prints one line per figure; the exit code is 1 if a bound is missed.

- The DiT's forward reaches at least 70 % of the FLOP/s of plain bfloat16 linears of its largest shape. Forward and
  linears alternate within one run and take about equally long, so that whatever else the machine does slows down both;
  of each, the best round counts, since interference only ever slows. The linears take the weights of the model's own
  layers in turn: neither side finds them cached. One thread by default: the share of a core's speed. With more, small
  operations wait for whichever thread another program holds up, so that needs an idle machine.
- Loading a checkpoint takes at most 1.15 times the weights as stored in memory, at the peak, measured in a fresh
  process as growth over what it has after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from magihuman_fast.checkpoints.synthetic import random_dit_tensors, write_dit
from magihuman_fast.model.config import PATCH, DiTConfig
from magihuman_fast.model.dit import DiT

# The published model's proportions (mm layers at both ends, GELU7 first) at a size a CPU runs in seconds.
FORWARD_CONFIG = DiTConfig(
    num_layers=8,
    hidden_size=1280,
    num_query_groups=2,
    text_in_channels=896,
    mm_layers=(0, 7),
    gelu7_layers=(0,),
)
GRID = (9, 10, 10)  # latent frames, patch rows, patch columns: 900 video tokens
NUM_AUDIO, NUM_TEXT = 60, 40
# All 40 layers, narrow: the largest tensor is as small beside the whole model as it is in the published one.
LOADING_CONFIG = DiTConfig(hidden_size=512, num_query_groups=1, text_in_channels=256)
MIN_SHARE = 0.70
MAX_LOADING = 1.15


def forward_flops(config: DiTConfig, rows: tuple[int, int, int]) -> int:
    """Floating-point operations of one forward with rows (video, audio, text): linears and attention products."""
    length, h = sum(rows), config.hidden_size
    channels = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
    total = sum(2 * n * c * h for n, c in zip(rows, channels, strict=True))
    total += sum(2 * n * c * h for n, c in zip(rows[:2], channels[:2], strict=True))
    for i in range(config.num_layers):
        width = config.intermediate(i)
        columns = config.qkvg_rows + h + width * (2 if config.is_gelu(i) else 3)
        total += 2 * length * h * columns
        total += 4 * length**2 * config.num_q_heads * config.head_dim
    return total


def bench_forward(rounds: int) -> list[dict[str, Any]]:
    """FLOP/s of the forward, and as a share of what linears of its largest shape reach in the same rounds."""
    config = FORWARD_CONFIG
    dit = DiT.from_state_dict(config, dict(random_dit_tensors(config)))
    generator = torch.Generator().manual_seed(0)
    t, h, w = GRID
    video = torch.randn(48, t, h * PATCH, w * PATCH, generator=generator)
    audio = torch.randn(NUM_AUDIO, config.audio_in_channels, generator=generator)
    text = torch.randn(NUM_TEXT, config.text_in_channels, generator=generator)
    rows = (t * h * w, NUM_AUDIO, NUM_TEXT)
    length = sum(rows)

    weights = [layer.up_gate[0] for layer in dit.layers if len(layer.up_gate) == 1]
    largest = max(weights, key=torch.numel)
    weights = [weight for weight in weights if weight.shape == largest.shape]
    x = torch.randn(length, config.hidden_size, generator=generator).bfloat16()
    linear_flops = 2 * length * largest.numel()
    flops = forward_flops(config, rows)

    repeats = max(1, round(flops / (len(weights) * linear_flops)))
    linear, forward = [], []
    for i in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(repeats):
            for weight in weights:
                F.linear(x, weight)
        middle = time.perf_counter()
        dit.velocity(video, audio, text)
        end = time.perf_counter()
        if i:  # the first round warms up
            linear.append(repeats * len(weights) * linear_flops / (middle - start))
            forward.append(flops / (end - middle))
    n, k = largest.shape
    label = f"{length} tokens, hidden {config.hidden_size}, {config.num_layers} layers, bf16"
    return [
        figure(f"linear ({length}x{k} by {n}x{k}, bf16)", max(linear) / 1e9, "GFLOP/s"),
        figure(f"DiT forward ({label})", 1e3 * flops / max(forward), "ms"),
        figure(f"DiT forward ({label})", max(forward) / 1e9, "GFLOP/s"),
        figure("DiT forward / linear, best rounds", max(forward) / max(linear), "", at_least=MIN_SHARE),
        figure("DiT forward / linear, median rounds", median(forward) / median(linear), ""),
    ]


def bench_loading(folder: Path) -> list[dict[str, Any]]:
    """Peak memory of loading, as a multiple of the weights in memory, for each way of storing them."""
    figures = []
    layouts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("float32 shards", {"linear_dtype": torch.float32}),
        ("float32 .zst shards", {"linear_dtype": torch.float32, "compress": True}),
        ("bfloat16 shards", {"linear_dtype": torch.bfloat16}),
    )
    for i, (name, options) in enumerate(layouts):
        path = folder / str(i)
        write_dit(path, LOADING_CONFIG, **options)
        command = [sys.executable, __file__, "--load", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        ratio = found["peak_bytes"] / found["weight_bytes"]
        size = f"{found['weight_bytes'] / 2**20:.0f} MiB of weights"
        figures.append(figure(f"loading {name} ({size}), seconds", found["seconds"], "s"))
        figures.append(figure(f"loading {name} ({size}), peak / weights", ratio, "", at_most=MAX_LOADING))
    return figures


def load_and_measure(path: Path) -> None:
    """Load a DiT folder in this process and print its peak memory beyond what the process had before."""
    # Whatever torch sets up at first use belongs to the process, not to the model.
    F.linear(torch.zeros(64, 64).bfloat16(), torch.zeros(64, 64).bfloat16())
    from magihuman_fast.model.weights import open_checkpoint

    checkpoint = open_checkpoint(path)
    before = memory_line("VmRSS")
    start = time.perf_counter()
    dit = DiT.from_checkpoint(checkpoint)
    seconds = time.perf_counter() - start
    peak = memory_line("VmHWM") - before
    layers = [tensor for layer in dit.layers for tensor in vars(layer).values()]
    others = [t for pair in (*dit.adapter.values(), *dit.head.values()) for t in pair]
    weights = sum(tensor.nbytes for tensor in [*layers, *others, dit.bands])
    print(json.dumps({"peak_bytes": peak, "weight_bytes": weights, "seconds": seconds}))


def memory_line(name: str) -> int:
    """Bytes the kernel reports of this process: VmRSS (resident now) or VmHWM (at most so far)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    if match is None:
        raise SystemExit(f"error: {name} not found in the process status")
    return int(match[1]) * 1024


def figure(
    name: str, value: float, unit: str, *, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """One measured value, with the bound it must keep, if any."""
    ok = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {"name": name, "value": value, "unit": unit, "at_least": at_least, "at_most": at_most, "ok": ok}


def line(entry: dict[str, Any]) -> str:
    text = f"{entry['name']}: {entry['value']:.3g} {entry['unit']}".rstrip()
    for bound, words in (("at_least", "at least"), ("at_most", "at most")):
        if entry[bound] is not None:
            text += f" ({words} {entry[bound]:g}: {'ok' if entry['ok'] else 'MISSED'})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Speed and loading of the reference path on this CPU.")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default: 1)")
    parser.add_argument(
        "--rounds", type=int, default=12, metavar="N", help="of linears and forward (default: 12)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load is not None:
        load_and_measure(args.load)
        return 0
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    if load > 0.5 and args.threads > 1:
        print(f"note: load average {load:.1f}: threads that wait for one another suffer from other programs")
    figures = bench_forward(args.rounds)
    for entry in figures:
        print(line(entry), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for entry in bench_loading(Path(folder)):
            print(line(entry), flush=True)
            figures.append(entry)
    if args.json is not None:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": load}
        args.json.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n")
    return 0 if all(entry["ok"] for entry in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
