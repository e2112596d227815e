"""The whole run of `gpu_check.py` on the CPU and in the simulator, with planted faults: is each contained and named?

One test hangs, one crashes its process, one gives wrong numbers, one loses the device, one group runs out of its
seconds, and the device probe fails once. Everything after each must still run, and each must leave evidence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gpu_plan
import report
import watched_tests
from gpu_plan import Group
from gpu_run import Run, check, probe
from records import Child

BUDGET = 400
PLANTED = Path(__file__).with_name("planted_faults.py")
TESTS, OVERRUN, THREADS = "planted-tests", "planted-overrun", "planted-threads"


def faulty_tests(child: Child) -> None:
    watched_tests.run(child, [PLANTED], ".*", "not gpu")


def overrun(child: Child) -> None:
    for i in range(1000):
        if child.begin(f"part {i}"):
            time.sleep(0.05)
            child.end(f"part {i}")


def on_threads(child: Child) -> None:
    """What hangs for ever in a child whose parent has had threads."""
    child.begin("two threads")
    torch.set_num_threads(2)
    assert int(torch.ones(1 << 22).add_(1).sum()) == 2 << 22
    child.end("two threads")


def with_faults(plan: Sequence[Group]) -> tuple[Group, ...]:
    """The plan with two groups of planted faults among its first ones."""
    planted = (
        Group(TESTS, 60, "tests that hang, crash, lose the device and are wrong", faulty_tests, stall=2),
        Group(OVERRUN, 2, "work without end", overrun),
        Group(THREADS, 30, "work on several threads", on_threads),
    )
    return (*plan[:2], planted[0], *plan[2:3], *planted[1:], *plan[3:])


def failing_once(flag: Path, device: str) -> None:
    """A probe that fails the first time."""
    if not flag.exists():
        flag.touch()
        raise RuntimeError("planted: the device does not answer")
    probe(device)


def missing(record: dict[str, Any], plan: Sequence[Group]) -> Iterator[str]:
    """What a rehearsal's record should hold and does not."""
    groups = {entry["group"]: entry for entry in record["groups"]}
    for group in with_faults(plan):
        entry = groups.get(group.name, {"status": "missing"})
        planted = group.name in (TESTS, OVERRUN)
        if not planted and entry["status"] != "ok":
            yield f"{group.name}: expected ok, got {entry['status']}"
    faults = {
        (fault["group"], (fault["step"] or "").rsplit("::", 1)[-1]): fault["how"]
        for fault in record["faults"]
    }
    wanted = {
        (TESTS, "test_hangs"): "hung",
        (TESTS, "test_crashes"): "signal SIGABRT",
        (TESTS, "test_loses_the_device"): "device lost",
    }
    for key, how in wanted.items():
        if faults.get(key) != how:
            yield f"{key[1]}: expected '{how}', got {faults.get(key)}"
    if not any(group == OVERRUN and how == "out of time" for (group, _), how in faults.items()):
        yield "the overrun was not stopped"
    outcomes = {
        test["test"].rsplit("::", 1)[-1]: test["outcome"] for test in record["tests"] if "test" in test
    }
    for name in ("test_right_before", "test_right_between", "test_right_after"):
        if outcomes.get(name) != "passed":
            yield f"{name}: expected passed, got {outcomes.get(name)}"
    if outcomes.get("test_wrong_numbers") != "failed" or not any(
        m["test"].endswith("test_wrong_numbers") for m in record["mismatches"]
    ):
        yield "the wrong numbers left no pattern"
    if not any("never ends" in fault["last"] for fault in record["faults"]):
        yield "the last line before the hang is not there"
    probes = [probe["how"] for probe in record["probes"]]
    if probes[:1] != ["exit code 1"] or "ok" not in probes[1:]:
        yield f"probes: expected one failure and then answers, got {probes}"


def rehearse(run: Run, work: Path, plan: Sequence[Group], head: dict[str, Any]) -> int:
    """0 only where every planted fault was contained, named and evidenced, and everything else ran."""
    watched_tests.preload([*gpu_plan.test_files(tuple(plan)), PLANTED])
    run.probe_work = partial(failing_once, work / "probed")
    record = check(with_faults(plan), run, budget=BUDGET, faulty=BUDGET, head=head)
    print(report.summary(record))
    lacking = list(missing(record, plan))
    for text in lacking:
        print(f"rehearsal: {text}")
    if not lacking:
        print(f"rehearsal: every planted fault was contained and named; {record['seconds']:.0f} s")
    return 1 if lacking else 0
