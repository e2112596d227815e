"""Renders `bench/results/*.json`: a table beside the targets, a plot, and which kernels have changed since.

python bench/report.py                  # table, baselines, and what is out of date
python bench/report.py --markdown       # only the kernels' table, as docs/kernels.md carries it
python bench/report.py --plot plot.png  # and a picture of each kernel's share of the measured ceiling
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sources import changed_files, digests, kernel_sources
from timing import ROOT, Result

RESULTS = ROOT / "bench" / "results"
NOT_RUN = "not yet run on a GPU"
FACTS = ("tests", "memcheck", "racecheck", "synccheck", "decoder, 256p", "decoder, 1080p")
UNITS = (" us", " TFLOP/s", " GB/s", "", "")
HEADER = ("kernel", "shape", "us", "TFLOP/s", "GB/s", "% of measured peak", "x baseline", "target", "run")


@dataclass(frozen=True)
class Target:
    """What a kernel must reach: `value` of its result is at least `at_least`. Patterns match whole names."""

    op: str
    shape: str
    value: str  # "speedup", "tflops", "peak_share" or "full_rate": operations a second over those without a window
    at_least: float  # with "seconds": at most
    baseline: str = ""

    def applies(self, op: str, shape: str) -> bool:
        return bool(re.fullmatch(self.op, op) and re.fullmatch(self.shape, shape))

    def text(self) -> str:
        if self.value == "speedup":
            return f"≥ {self.at_least:g} x {self.baseline}"
        if self.value == "seconds":
            return f"≤ {self.at_least:g} s"
        if self.value == "full_rate":
            return f"≥ {self.at_least:g} of the rate without a window"
        return (
            f"≥ {self.at_least:g} TFLOP/s"
            if self.value == "tflops"
            else f"≥ {100 * self.at_least:g} % of copy"
        )

    def met(self, result: Result, run: Sequence[Result] = ()) -> bool | None:
        """None where the result, or its run, lacks the value, or has it beside another baseline."""
        if self.value == "tflops":
            return rate(result) / 1e12 >= self.at_least
        if self.value == "seconds":
            return result.timing.seconds <= self.at_least
        if self.value == "full_rate":
            clip = result.shape.split(":")[0]
            full = [
                r for r in run if r.variant == "kernel" and re.fullmatch(f"{clip}: .* heads on .*", r.shape)
            ]
            return rate(result) >= self.at_least * rate(full[0]) if full else None
        if self.value == "speedup":
            if result.speedup is None or result.baseline != self.baseline:
                return None
            return result.speedup >= self.at_least
        return None if result.peak_share is None else result.peak_share >= self.at_least


def rate(result: Result) -> float:
    """Operations a second."""
    return result.flops / result.timing.seconds


TARGETS = (
    Target("gemm", ".*", "speedup", 0.97, "cuBLAS"),
    Target("gemm", "256p: .*", "tflops", 740),
    Target("gemm_.*", ".*", "speedup", 1.08, "cuBLAS + compiled epilogue"),
    Target("gated_attention", ".* heads on .*", "speedup", 1.0, "SDPA cudnn"),
    Target("gated_attention", "(256p|540p): .* heads on .*", "tflops", 640),
    Target("gated_attention", ".* window .*", "full_rate", 0.95),
    Target("conv_3x3", r".*: (128|256|512) -> (128|256|512) channels.*", "tflops", 500),
    Target("conv_3x3", ".*: (64|128) -> 64 channels.*", "tflops", 350),
    Target("decode_window", ".*", "speedup", 2.0, "cuDNN, channels last"),
    Target("decode_clip", "256p: .*", "seconds", 0.15),
    Target("decode_clip", "540p: .*", "seconds", 0.65),
    Target("decode_clip", "1080p: .*", "seconds", 2.6),
    Target("channel_norm", ".*", "peak_share", 0.85),
    Target("rms_norm|renoise_step|clamp_image|unipc_step", ".*", "peak_share", 0.85),
)


def load(folder: Path) -> list[dict[str, Any]]:
    """The record in a run's `folder`, or in every one below it, the oldest first; rehearsals measure nothing and are
    left out."""
    paths = sorted([*folder.glob("record.json"), *folder.glob("*/record.json")])
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for record in records:
        # A run of few groups may have described its machine only beside what it measured.
        described = (
            value["machine"] for fact in record["facts"] for value in fact.values() if "machine" in value
        )
        if "gpu" not in record["machine"]:
            record["machine"] = next(described, {}) | record["machine"]
    return sorted((r for r in records if not r["rehearsal"]), key=lambda r: str(r["machine"].get("date")))


def results_of(record: dict[str, Any]) -> list[Result]:
    return [Result.from_dict({k: v for k, v in entry.items() if k != "group"}) for entry in record["results"]]


def latest(records: Sequence[dict[str, Any]]) -> dict[tuple[str, str], tuple[Result, dict[str, Any]]]:
    """The newest result of each kernel and shape on a GPU, with the record it comes from."""
    found = {}
    for record in records:
        for result in results_of(record):
            if result.variant == "kernel" and result.device != "cpu":
                found[result.op, result.shape] = (result, record)
    return found


def where(record: dict[str, Any]) -> str:
    machine = record["machine"]
    commit = (machine["commit"] or "unknown")[:10]
    return f"{machine.get('gpu')}, {commit}{' (dirty)' if machine['dirty'] else ''}"


def row(result: Result, record: dict[str, Any]) -> tuple[str, ...]:
    values = result.line().split("): ", 1)[1].split(" | ")[:5]
    numbers = [
        value.removesuffix(unit)
        for value, unit in zip(values, (" us", " TFLOP/s", " GB/s", "", ""), strict=True)
    ]
    targets = [target for target in TARGETS if target.applies(result.op, result.shape)]
    words = {True: "met", False: "missed", None: "not measured"}
    run = results_of(record)
    judged = "; ".join(f"{target.text()}: {words[target.met(result, run)]}" for target in targets)
    return (result.op, result.shape, *numbers, judged or "-", where(record))


def unmeasured_row(op: str, run: str) -> tuple[str, ...]:
    targets = "; ".join(dict.fromkeys(t.text() for t in TARGETS if re.fullmatch(t.op, op)))
    return (op, "-", *["-"] * 5, targets or "-", run)


def tested(op: str, records: Sequence[dict[str, Any]]) -> str:
    """Of an operation that was not timed: whether a run's tests of it passed."""
    for record in reversed(records):
        mine = [test["outcome"] for test in record["tests"] if f"test_{op}" in test.get("test", "")]
        if mine and set(mine) == {"passed"}:
            return f"right, not timed: {where(record)}"
    return NOT_RUN


def markdown(rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def operations(root: Path) -> dict[str, list[str]]:
    """Every operation with its sources; a decode window and a clip, measured as one, are made of the decoder's."""
    found = kernel_sources(root)
    parts = [files for op, files in found.items() if op.startswith("conv_")]
    whole = sorted(set().union(*parts))
    return found | ({"decode_window": whole, "decode_clip": whole} if parts else {})


def kernel_table(records: Sequence[dict[str, Any]], root: Path = ROOT) -> str:
    """Every kernel: its newest results, or that it has none."""
    measured, now = latest(records), digests(root)
    rows = []
    for op, files in operations(root).items():
        own = []
        for result, record in (found for (name, _), found in measured.items() if name == op):
            *cells, run = row(result, record)
            changed = changed_files(files, record["sources"], now)
            own.append((*cells, f"{run}; changed since" if changed else run))
        rows += own or [unmeasured_row(op, tested(op, records))]
    return markdown(rows)


def stale(records: Sequence[dict[str, Any]], root: Path = ROOT) -> dict[str, str]:
    """Kernels whose sources are not those of their last run, or that have none, and why."""
    now, found = digests(root), {}
    runs = {op: record for record in records for op, _ in latest([record])}
    for op, files in operations(root).items():
        if op not in runs:
            found[op] = tested(op, records)
            continue
        changed = changed_files(files, runs[op]["sources"], now)
        if changed:
            found[op] = f"changed since {where(runs[op])}: {', '.join(changed)}"
    return found


def summary(record: dict[str, Any]) -> str:
    """One run: ceilings, results, and last, because it is what is read first, its groups and what was wrong."""
    machine = record["machine"]
    lines = [
        f"{where(record)}; torch {machine.get('torch')}, CUDA {machine.get('cuda')}, nvcc {machine.get('nvcc')}"
    ]
    if record["ceilings"]:
        first = record["ceilings"][0]
        copy, product = first["copy_bytes"] / 1e9, first["bf16_flops"] / 1e12
        lines.append(f"ceilings: copy {copy:.4g} GB/s, bf16 product {product:.4g} TFLOP/s ({first['note']})")
    for fact in record["facts"]:
        lines += [f"{key}: {value}" for key, value in fact.items() if key in FACTS]
    lines += [result.line() for result in results_of(record)]
    lines += [
        f"{e['op']}, {e['variant']} ({e['shape']}): {e['error'].splitlines()[0][:160]}"
        for e in record["errors"]
    ]
    lines += [f"{entry['group']}: {group_line(entry)}" for entry in record["groups"]]
    lines += [f"{fault['group']}: {fault['how']} in {fault['step']}" for fault in record["faults"]]
    lines += failures(record)
    if record["rehearsal"]:
        lines.append("rehearsal: toy sizes on the CPU; nothing here says anything about speed")
    return "\n".join(lines)


def group_line(entry: dict[str, Any]) -> str:
    """How a group went: its status and its tests."""
    counts = [
        f"{entry[name]} {name}" for name in ("passed", "skipped", "not ended", "errors") if entry.get(name)
    ]
    failed = [f"{len(entry['failed'])} failed"] if entry.get("failed") else []
    return ", ".join([entry["status"], f"{entry['seconds']} s", *counts, *failed])


def failures(record: dict[str, Any]) -> list[str]:
    """One line for each failed test: what it said last."""
    failed = [test for test in record["tests"] if test.get("outcome") == "failed"]
    return [f"FAILED {test['test']}: {' '.join(test['message'].split())[-200:]}" for test in failed]


CLIP_STAGES = ("denoise", "super_resolution", "decode", "sound")


def clip_table(records: Sequence[dict[str, Any]]) -> str:
    """The newest clips of each preset, in seconds, and the newest step of each size, in milliseconds."""
    clips: dict[str, tuple[str, ...]] = {}
    for record in records:
        for fact in record["facts"]:
            for name, found in fact.items():
                if name.startswith("clip "):
                    stages = [
                        f"{found['stages'][s]:.3f}" if s in found["stages"] else "-" for s in CLIP_STAGES
                    ]
                    cells = (f"{found['after_text']:.3f}", *stages, f"{found['first']:.2f}")
                    clips[name] = (
                        name.removeprefix("clip "),
                        *cells,
                        f"{found['peak_bytes'] / 1e9:.1f}",
                        where(record),
                    )
                elif name.startswith("step "):
                    seconds = sum(launch["seconds"] + launch["gap"] for launch in found["launches"])
                    row = (f"one step, {name.removeprefix('step ')}", f"{1e3 * seconds:.1f} ms")
                    clips[name] = (*row, *["-"] * 6, where(record))
    header = ("clip", "after text", *CLIP_STAGES, "first clip", "peak GB", "run")
    return markdown(list(clips.values()), header)


def baseline_table(records: Sequence[dict[str, Any]]) -> str:
    """The newest result of everything that is not a kernel of ours."""
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for record in records:
        for result in results_of(record):
            if result.variant != "kernel" and result.device != "cpu":
                op, *rest = row(result, record)
                found[result.op, result.variant, result.shape] = (
                    f"{op}, {result.variant}",
                    *rest[:5],
                    rest[7],
                )
    return markdown(list(found.values()), (*HEADER[:6], HEADER[8]))


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar per kernel and shape: its share of what the run's ceilings allow, and its baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [result for result, _ in latest(records).values() if result.peak_share]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.4 * max(1, len(found))))
    labels = [f"{result.op}\n{result.shape}" for result in found]
    shares = [100 * (result.peak_share or 0) for result in found]
    against = [
        share / result.speedup if result.speedup else 0 for share, result in zip(shares, found, strict=True)
    ]
    places = range(len(found))
    axes.barh([p + 0.2 for p in places], shares, 0.4, label="kernel", color="#2a6f97")
    axes.barh([p - 0.2 for p in places], against, 0.4, label="its baseline", color="#bbbbbb")
    axes.set_yticks(list(places), labels, fontsize=6)
    axes.set_xlabel("% of the ceiling measured in the same run")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    if found:
        axes.legend(loc="lower right")
    else:
        axes.text(0.5, 0.5, f"kernels: {NOT_RUN}", ha="center", transform=axes.transAxes)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The measurements in bench/results as a table and a plot.")
    help_text = "a run's folder, or one of such folders (default: bench/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=help_text)
    parser.add_argument("--markdown", action="store_true", help="print only the kernels' table")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG as well")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        parser.error(f"--results: expected a folder, got {args.results}")
    records = load(args.results)
    print(kernel_table(records))
    if not args.markdown:
        print(f"\nWhole clips and steps:\n\n{clip_table(records)}")
        if any(record["results"] for record in records):
            print(f"\nBaselines:\n\n{baseline_table(records)}")
        out_of_date = stale(records)
        if out_of_date:
            print("\nSources against those of the runs (bench/results/README.md tells of the runs):")
        for op, reason in out_of_date.items():
            print(f"\n{op}: {reason}" if op == next(iter(out_of_date)) else f"{op}: {reason}")
        if not out_of_date:
            print("\nEvery kernel's sources are those of its last run.")
    if args.plot is not None:
        plot(records, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
