"""The whole pipeline's latency: cold start, every stage warm, and the compiled reference path in the same run.

    python bench/bench_e2e.py --presets 256p,540p,1080p      # on a Hopper GPU; JSON and plot to bench/results/e2e
    python bench/bench_e2e.py --plot-only FILE.json          # draw a record again

What is measured is `magihuman_fast.cli.benchmark`, which `magihuman-fast bench` runs too; this adds the machine, the
commit and the files; the record is written anew whenever something is found. Without a GPU it runs a toy on the
reference path, says so, and keeps nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from magihuman_fast.cli import benchmark
from magihuman_fast.cli.commands import table
from records import default_path, write
from timing import describe_machine

STAGES = ("audio_encode", "image_encode", "sr_image_encode", "denoise", "super_resolution", "decode", "sound")


def plot(record: dict[str, Any], path: Path) -> None:
    """A bar for each preset and path, its stages one after another; the target beside it."""
    from matplotlib.figure import Figure

    warm = record["warm"]
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(warm)), layout="constrained")
    axes = figure.subplots()
    names = [f"{m['preset']}, {m['path']}" for m in warm]
    left = [0.0] * len(warm)
    for stage in STAGES:
        seconds = [m["stages"].get(stage, 0.0) for m in warm]
        if any(seconds):
            axes.barh(names, seconds, left=left, label=stage)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
    for i, m in enumerate(warm):
        target = benchmark.TARGETS[m["preset"]]
        axes.plot([target, target], [i - 0.4, i + 0.4], color="black", label="target" if i == 0 else None)
    machine = record["machine"]
    axes.set_title(f"{machine['gpu'] or 'CPU, toy weights'}, commit {str(machine['commit'])[:10]}")
    axes.set_xlabel("seconds after text encoding")
    axes.invert_yaxis()
    axes.legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Latency of the whole pipeline.")
    parser.add_argument("--presets", default="256p,540p,1080p", metavar="NAMES", help="default: all three")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (default: random weights)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="warm clips (default: 3)")
    parser.add_argument("--no-baseline", action="store_true", help="without the compiled reference path")
    parser.add_argument("--no-cold", action="store_true", help="without the fresh processes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default on a GPU: in bench/results/e2e")
    parser.add_argument("--plot-only", type=Path, metavar="FILE", help="draw this record and end")
    args = parser.parse_args(argv)
    if args.plot_only is not None:
        plot(json.loads(args.plot_only.read_text(encoding="utf-8")), args.plot_only.with_suffix(".png"))
        return 0
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print("no GPU: toy weights on the reference path; no figures of the model", flush=True)
    setting = benchmark.Setting(
        tuple(args.presets.split(",")),
        args.model,
        "full" if on_gpu else "tiny",
        runs=args.runs,
        baseline=not args.no_baseline,
        cold=not args.no_cold,
    )
    machine = describe_machine()
    kept = default_path(machine)
    path = args.out or (kept.parent / "e2e" / kept.name if on_gpu else None)

    def keep(found: dict[str, Any]) -> None:
        if path is not None:
            write(path, {"machine": machine, **found})

    found = benchmark.run(setting, lambda text: print(text, flush=True), keep)
    header, *rows = benchmark.rows(found)
    print("\n".join(["", table(header, rows), *benchmark.notes(found)]))
    if path is not None:
        plot({"machine": machine, **found}, path.with_suffix(".png"))
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
