"""Everything that needs a Hopper GPU, in one command: build, test, sanitize, time; one JSON file of results.

    python bench/gpu_check.py                       # all parts, the most important first, in 9 minutes
    python bench/gpu_check.py --parts build,tests   # only these
    python bench/gpu_check.py --dry-run             # no GPU: the plan, then parts at a toy size on the CPU

Needs torch 2.11 or later, Python 3.11 or later, nvcc and what pyproject.toml lists under build-system; no network, and
no installation of the package. Each part runs in a process of its own with a time limit; the file is written anew after
each, so that whatever stops a run leaves what was found before. Exit codes: 0 every part succeeded, 1 not, 2 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import report
from sources import digests
from timing import ROOT, describe_machine

FORMAT = 1
PARTS_SCRIPT = Path(__file__).with_name("gpu_parts.py")
RESULTS = ROOT / "bench" / "results"
MIN_SECONDS = 15  # a part is not begun with less
TAIL = 6000  # characters of a part's output that are kept
HOPPER = (9, 0)
# What records are collected under.
KINDS = {"result": "results", "error": "errors", "ceilings": "ceilings", "fact": "facts"}


def missing_gpu() -> str | None:
    """Why there is nothing to check here; None on a Hopper GPU."""
    if not torch.cuda.is_available():
        return "no CUDA device (torch " + torch.__version__ + ")"
    capability = torch.cuda.get_device_capability()
    if capability != HOPPER:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, not 9.0"
        )
    return None


def default_path(machine: dict[str, Any]) -> Path:
    """`<gpu>-<commit>.json`; a dirty tree says so."""
    gpu = str(machine["gpu"] or "no-gpu").lower().removeprefix("nvidia ").replace(" ", "-")
    commit = (machine["commit"] or "unknown")[:10]
    return RESULTS / f"{gpu}-{commit}{'-dirty' if machine['dirty'] else ''}.json"


def write(path: Path, record: dict[str, Any]) -> None:
    """Aside first: a run that is stopped while writing leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def run_part(words: Sequence[str], seconds: float, log: Path) -> str:
    """Run one part, its output into `log`; "ok", "exit code N" or "stopped after N s"."""
    with log.open("wb") as output:
        part = subprocess.Popen(
            words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = part.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            # Whatever it has started too: a compiler, a test run. Also when this script itself is interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)
            # A process stuck in the driver does not die; the record is written all the same.
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.wait(timeout=10)
    return "ok" if code == 0 else f"exit code {code}"


def collect(record: dict[str, Any], name: str, records: Path) -> None:
    """Add what a part has recorded; a last line cut off by its end is left out."""
    if not records.is_file():
        return
    for line in records.read_text(encoding="utf-8").splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        for kind, value in found.items():
            record[KINDS[kind]].append({"part": name, **value})


def check(parts: Sequence[str], path: Path, budget: float, dry: bool, commit: str | None) -> dict[str, Any]:
    """Run the parts within `budget` seconds; the record, also written to `path` after every part."""
    from gpu_parts import PARTS

    start = time.monotonic()
    machine = describe_machine() | ({"commit": commit, "dirty": None} if commit else {})
    record: dict[str, Any] = {"format": FORMAT, "dry_run": dry, "machine": machine, "sources": digests(ROOT)}
    record |= {"parts": [], **{name: [] for name in KINDS.values()}}
    with tempfile.TemporaryDirectory() as folder:
        for name in parts:
            left = budget - (time.monotonic() - start)
            entry: dict[str, Any] = {"part": name}
            record["parts"].append(entry)
            if left < MIN_SECONDS:
                entry["status"] = "left out: no time left"
                continue
            records, log = Path(folder) / f"{name}.jsonl", Path(folder) / f"{name}.log"
            words = [sys.executable, str(PARTS_SCRIPT), name, str(records), *(["--dry-run"] if dry else [])]
            entry["status"] = "running"
            write(path, record)
            began = time.monotonic()
            entry["status"] = run_part(words, min(left, PARTS[name].seconds), log)
            entry["seconds"] = round(time.monotonic() - began, 1)
            entry["output"] = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
            collect(record, name, records)
            write(path, record)
            print(f"{name}: {entry['status']}, {entry['seconds']} s", flush=True)
            if entry["status"] != "ok":
                print(entry["output"][-1500:], flush=True)
    write(path, record)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and time the kernels on a Hopper GPU.")
    parser.add_argument("--parts", metavar="A,B", help="only these parts (default: all)")
    parser.add_argument(
        "--budget", type=float, default=540, metavar="SECONDS", help="for all parts (default: 540)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<gpu>-<commit>.json")
    parser.add_argument("--commit", metavar="HASH", help="of these sources, where there is no git")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU; needs no GPU")
    args = parser.parse_args(argv)
    reason = missing_gpu()
    if reason is not None and not args.dry_run:
        print(f"gpu_check: nothing to do, a Hopper GPU is needed: {reason}")
        return 2
    from gpu_parts import PARTS, REHEARSAL

    # As an exception, so that the part that runs is ended with this script instead of keeping the GPU busy.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parts = list(REHEARSAL if args.dry_run else PARTS) if args.parts is None else args.parts.split(",")
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        parser.error(f"--parts: expected some of {', '.join(PARTS)}; got {', '.join(unknown)}")
    print(f"{len(parts)} parts within {args.budget:.0f} s, each in a process of its own:")
    for name, part in PARTS.items():
        print(f"  {name} (at most {part.seconds} s): {part.what}{'' if name in parts else ' (left out)'}")
    machine = describe_machine() | ({"commit": args.commit, "dirty": None} if args.commit else {})
    with tempfile.TemporaryDirectory() as folder:
        path = args.out or (Path(folder) / "dry-run.json" if args.dry_run else default_path(machine))
        record = check(parts, path, args.budget, args.dry_run, args.commit)
        print(report.summary(record))
        if not args.dry_run or args.out is not None:
            print(f"written: {path}")
    return 0 if all(entry["status"] == "ok" for entry in record["parts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
