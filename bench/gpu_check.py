"""Everything that needs a Hopper GPU, in one command: set up, test, time; a record of what was found, as it is found.

    python bench/gpu_check.py --kit build/gpu-kit --out DIR     # on the GPU machine, with what `make gpu-kit` prepared
    python bench/gpu_check.py --out DIR                         # with the package built in place
    python bench/gpu_check.py --rehearse --out DIR              # no GPU: the same plan on toys, with planted faults

Each group of the plan (`gpu_plan.py`) runs in a forked child with a limit of its own; whatever hangs or crashes is
named, probed, and left behind. DIR gets at most 8 files: record.json, records.jsonl (as found), log.txt (everything
said), tensors.pt (of failed comparisons), hangs.txt (where kernels hung), clocks.csv.
Exit codes: 0 all is right, 1 not, 2 no GPU, 3 what ran is right and time has cut off the rest.
"""

from __future__ import annotations

import argparse
import json
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Test and time the kernels on a Hopper GPU.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: bench/results/<gpu>-<commit>")
    parser.add_argument(
        "--kit", type=Path, metavar="DIR", help="what `make gpu-kit` prepared; it is put in place"
    )
    parser.add_argument("--plan", choices=("first", "second"), default="first", help="default: first")
    parser.add_argument(
        "--beside", type=Path, metavar="DIR", help="another build of _C and the kernels, timed too"
    )
    parser.add_argument("--groups", metavar="A,B", help="only these groups (default: all of the plan)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all groups")
    parser.add_argument("--faulty-budget", type=float, metavar="SECONDS", help="for all, once one was bad")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with planted faults; needs no GPU"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    facts: dict[str, Any] = {}
    manifest: dict[str, Any] = {}
    from sources import digests

    if args.kit is not None:
        gpu_kit.add_packages(args.kit)
        facts = gpu_kit.install(args.kit)
        manifest = json.loads((args.kit / "manifest.json").read_text(encoding="utf-8"))
        if manifest["sources"] != digests(gpu_kit.ROOT):
            raise SystemExit("the kit is not made of these sources: make gpu-kit")
    if not args.rehearse and shutil.which("nvidia-smi") is None:
        print("gpu_check: nothing to do, a Hopper GPU is needed: no nvidia-smi")
        return 2
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
    from timing import describe_commit

    # As an exception, so that the child that runs is ended with this script instead of keeping the GPU busy.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    plan = gpu_plan.PLANS[args.plan]
    if args.beside is not None:
        plan = gpu_plan.beside(plan, args.beside)
    if args.groups is not None:
        names = args.groups.split(",")
        unknown = set(names) - {group.name for group in plan}
        if unknown:
            raise SystemExit(
                f"--groups: expected some of {', '.join(g.name for g in plan)}; got {', '.join(unknown)}"
            )
        plan = tuple(group for group in plan if group.name in names)
    # What travelled is the kit's commit, whatever the copy beside it takes itself for.
    machine = {name: manifest[name] for name in ("commit", "dirty")} if manifest else describe_commit()
    head = {"rehearsal": args.rehearse, "machine": machine, "sources": digests(gpu_kit.ROOT), "kit": facts}
    head["plan"] = [{"group": g.name, "seconds": g.seconds} for g in plan]
    with tempfile.TemporaryDirectory() as work:
        if args.rehearse:
            import rehearsal

            return rehearsal.run(args.out, Path(work), plan, head)
        run = gpu_run.Run(args.out or default_folder(machine), "cuda", Path(work))
        clocks = run.clocks = gpu_run.Clocks(run.folder / "clocks.csv")
        try:
            watched_tests.preload(gpu_plan.test_files(plan))
            budget = args.budget or gpu_plan.BUDGET
            record = gpu_run.check(
                plan, run, budget=budget, faulty=args.faulty_budget or gpu_plan.FAULTY_BUDGET, head=head
            )
        finally:
            clocks.stop()
        print(report.summary(record))
    if any(map(gpu_run.is_bad, record["groups"])):
        return 1
    return 3 if any(entry["status"] != "ok" for entry in record["groups"]) else 0


def default_folder(machine: dict[str, Any]) -> Path:
    from records import default_path

    words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "--id=0"]
    name = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return default_path({**machine, "gpu": name}).with_suffix("")


if __name__ == "__main__":
    sys.exit(main())
