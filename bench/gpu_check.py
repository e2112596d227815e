"""Everything that needs a Hopper GPU, in one command: set up, test, time; a record of what was found, as it is found.

    python bench/gpu_check.py --kit build/gpu-kit --out DIR     # on the GPU machine, with what `make gpu-kit` prepared
    python bench/gpu_check.py --out DIR                         # with the package built in place
    python bench/gpu_check.py --rehearse --out DIR              # no GPU: the same plan on toys, with planted faults

Each group of the plan (`gpu_plan.py`) runs in a forked child with a limit of its own; whatever hangs or crashes is
named, probed, and left behind. DIR gets at most 8 files: record.json, records.jsonl (as found), log.txt (everything
said), tensors.pt (of failed comparisons), hangs.txt (where kernels hung), clocks.csv.
Exit codes: 0 all is right, 1 not, 2 nothing was run (no GPU, or something asked for that cannot be had), 3 what ran is
right and time has cut off the rest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpu_kit


class Refused(Exception):
    """Something that was asked for cannot be had; in one line. Nothing has been run."""


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test and time the kernels on a Hopper GPU.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<gpu>-<commit>")
    parser.add_argument(
        "--kit", type=Path, metavar="DIR", help="what `make gpu-kit` prepared; it is put in place"
    )
    parser.add_argument(
        "--plan", choices=("first", "second", "baselines"), default="first", help="default: first"
    )
    parser.add_argument(
        "--beside", type=Path, metavar="DIR", help="another build of _C and the kernels, timed too"
    )
    parser.add_argument("--groups", metavar="A,B", help="only these groups (default: all of the plan)")
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="for all groups")
    parser.add_argument("--faulty-budget", type=seconds, metavar="SECONDS", help="for all, once one was bad")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with planted faults; needs no GPU"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not args.rehearse and shutil.which("nvidia-smi") is None:
        print("gpu_check: nothing to do, a Hopper GPU is needed: no nvidia-smi")
        return 2
    try:
        return check(args)
    except Refused as reason:
        print(f"gpu_check: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_check: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def check(args: argparse.Namespace) -> int:
    """Put the kit in place and run, or rehearse, the plan.

    Raises:
        Refused: a kit that is none or made of other sources, a folder that holds a run, unknown groups.
    """
    facts: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    if args.kit is not None:
        try:
            manifest = gpu_kit.manifest_of(args.kit)
        except ValueError as reason:
            raise Refused(f"--kit {args.kit}: {reason}") from None
        gpu_kit.add_packages(args.kit)
        facts = gpu_kit.install(args.kit)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, str(gpu_kit.ROOT))  # the package need not be installed
    os.environ.setdefault("PYTHONPATH", str(gpu_kit.ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"  # of this process, before torch is imported (fork_server.py says why)

    import fork_server

    fork_server.forbid_cuda()
    import gpu_plan
    import gpu_run
    import report
    import watched_tests
    from sources import digests
    from timing import describe_commit

    # As an exception, so that the child that runs is ended with this script instead of keeping the GPU busy.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    plan = gpu_plan.PLANS[args.plan]
    if args.beside is not None:
        plan = gpu_plan.beside(plan, args.beside)
    if args.groups is not None:
        known, names = [group.name for group in plan], args.groups.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise Refused(f"--groups: expected some of {', '.join(known)}; got {unknown}")
        plan = tuple(group for group in plan if group.name in names)
    # What travelled is the kit's commit, whatever the copy beside it takes itself for.
    machine = {name: manifest[name] for name in ("commit", "dirty")} if manifest else describe_commit()
    head = {"rehearsal": args.rehearse, "machine": machine, "sources": digests(gpu_kit.ROOT), "kit": facts}
    head["plan"] = [{"group": g.name, "seconds": g.seconds} for g in plan]
    with tempfile.TemporaryDirectory() as folder:
        work, unnamed = Path(folder) / "work", Path(folder) / "out"
        work.mkdir()
        out = args.out or (unnamed if args.rehearse else default_folder(machine, args.plan))
        try:
            run = gpu_run.Run(out, "cpu" if args.rehearse else "cuda", work)
        except OSError as error:
            raise Refused(f"--out {out}: expected a new folder: {error.strerror or error}") from None
        if args.rehearse:
            import rehearsal

            return rehearsal.rehearse(run, work, plan, head)
        clocks = run.clocks = gpu_run.Clocks(run.folder / "clocks.csv")
        budget, faulty = args.budget or gpu_plan.BUDGET, args.faulty_budget or gpu_plan.FAULTY_BUDGET
        try:
            watched_tests.preload(gpu_plan.test_files(plan))
            record = gpu_run.check(plan, run, budget=budget, faulty=faulty, head=head)
        finally:
            clocks.stop()
        print(report.summary(record))
    if any(map(gpu_run.is_bad, record["groups"])):
        return 1
    return 3 if any(entry["status"] != "ok" for entry in record["groups"]) else 0


def default_folder(machine: dict[str, Any], plan: str) -> Path:
    from records import default_path

    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    name = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    path = default_path({**machine, "gpu": name}).with_suffix("")
    return path if plan == "first" else path.with_name(f"{path.name}-{plan}")


if __name__ == "__main__":
    sys.exit(main())
