"""One run of the groups of `gpu_plan.py`: each in forked children, watched, probed after, and recorded.

Importing this imports torch; `gpu_check.py` says what must be done before.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import core_dump
import report
from fork_server import STICKY, run_forked
from gpu_plan import Group
from records import Child, Records, write

MAX_CHILDREN = 4  # of one group: after so many that it did not survive, the next group comes
MAX_DUMPS = 4  # of a run: each takes seconds
MIN_SECONDS = 3  # a group is not begun with less
PROBE_SECONDS = 5.0
FORMAT = 2


class Run:
    """One run: its folder, its records, and the children that fill them.

    Raises:
        OSError: the folder holds a run, or cannot be made.
    """

    def __init__(self, folder: Path, device: str, work: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self._work = folder, device, work
        self.records = Records(folder / "records.jsonl")
        # Steps of an earlier run would count as done; and two at once do not share a folder.
        self.records.path.touch(exist_ok=False)
        self.log = folder / "log.txt"
        self.clocks: Clocks | None = None
        self.groups: list[dict[str, Any]] = []
        self.probe_work: Callable[[str], object] = probe
        self._dumps = device == "cuda"
        self._readers: list[tuple[Any, Path, str, str]] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def group(self, group: Group, deadline: float) -> dict[str, Any]:
        """Run one group until it is done, or out of time, or has lost too many children; its entry."""
        began, began_at = time.monotonic(), time.time()
        end = min(deadline, began + group.seconds)
        entry: dict[str, Any] = {"group": group.name, "what": group.what, "status": "running"}
        self.groups.append(entry)
        self.say(f"===== {group.name}: {group.what}")
        status, lost = "", 0
        while not status:
            skip = frozenset(self.records.begun_steps(group.name))
            child = Child(group.name, self.records, self.folder / "tensors.pt", device=self.device, skip=skip)
            dump = self._work / f"dump-{group.name}-{lost}"
            environment = self._dump_environment(group, dump)
            ended = run_forked(
                lambda child=child: group.work(child),
                log=self.log,
                seconds=end - time.monotonic(),
                stall=group.stall or group.seconds,
                heartbeat=self.records.path,
                environment=environment,
                # A rehearsal shares its few cores with whatever else runs there.
                threads=(os.cpu_count() or 1) if self.device == "cuda" else 1,
                before_kill=lambda pid, dump=dump, on=bool(environment): self._dump(dump, group.name, on),
            )
            self.records.mend()
            if ended.how.startswith(("signal", "exit")) and (dump / "core").exists():
                self._read(dump, group.name)  # of an exception
            is_open = self.records.lose(group.name)
            if ended.how == "ok" or (ended.how == "exit code 1" and is_open is None):
                status = "ok" if ended.how == "ok" else "failed"
                break
            how = "device lost" if ended.how == f"exit code {STICKY}" else ended.how
            lost += 1
            self.records.add(group.name, "fault", {"how": how, "step": is_open, "last": last_line(self.log)})
            self.say(f"{group.name}: {how} in {is_open or 'no step'}")
            self.probe(group.name)
            if how == "out of time" or end - time.monotonic() < MIN_SECONDS:
                status = "out of time"
            elif lost >= MAX_CHILDREN or is_open is None:
                status = f"{lost} children lost"
        entry |= {"status": status, "seconds": round(time.monotonic() - began, 1), "lost": lost}
        entry |= outcome(self.records.of("test", group.name), self.records.of("error", group.name))
        if self.clocks is not None:
            entry["clocks"] = self.clocks.between(began_at, time.time())
        if status == "ok" and (lost or any(map(entry.get, ("failed", "errors", "skipped", "not ended")))):
            entry["status"] = "failed"
        self.say(f"{group.name}: {report.group_line(entry)}")
        return entry

    def probe(self, group: str, environment: dict[str, str] | None = None) -> bool:
        """Whether the device still answers a fresh process: one known kernel, within a few seconds."""
        ended = run_forked(
            lambda: self.probe_work(self.device),
            log=self.log,
            seconds=PROBE_SECONDS,
            stall=PROBE_SECONDS,
            heartbeat=self.records.path,
            environment=environment,
        )
        self.records.add(group, "probe", {"how": ended.how, "seconds": round(ended.seconds, 2)})
        self.say(f"{group}: probe: {ended.how}, {ended.seconds:.1f} s")
        return ended.how == "ok"

    def try_dumps(self) -> None:
        """Whether the device answers where cores may be asked for: the driver then works as under a debugger."""
        folder = self._work / "dump"
        folder.mkdir()
        self._dumps = self.probe("core dumps", core_dump.environment(folder))

    def _dump_environment(self, group: Group, dump: Path) -> dict[str, str]:
        if not (self._dumps and group.dumps) or len(self._readers) >= MAX_DUMPS:
            return {}
        dump.mkdir(exist_ok=True)
        return core_dump.environment(dump)

    def _dump(self, dump: Path, group: str, enabled: bool) -> None:
        """Take a core of the child that hangs, and begin to read it."""
        if enabled:
            self._read(dump, group, core_dump.trigger(dump))

    def _read(self, dump: Path, group: str, reason: str | None = None) -> None:
        """Begin to read a core; `reason`: why there is none."""
        step = self.records.open_step(group)
        found = reason or core_dump.start_reading(dump)
        if isinstance(found, str):
            self.records.add(group, "fact", {"core dump": found, "of": step})
        else:
            self._readers.append((found, dump, group, f"{group}: {step}"))

    def finish(self) -> None:
        """Collect what was told of the cores."""
        deadline = time.monotonic() + core_dump.READ_SECONDS
        for reader, dump, group, title in self._readers:
            seconds = max(0, deadline - time.monotonic())
            said = core_dump.finish_reading(reader, dump, self.folder / "hangs.txt", title, seconds)
            self.records.add(group, "fact", {"core dump": said, "of": title})


def probe(device: str) -> None:
    """In a fresh process: does one of torch's kernels give the right number?"""
    assert int((torch.arange(1000, device=device) + 1).sum()) == 500500


def last_line(path: Path) -> str:
    """What was said last, before Python told of its own end."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        said = file.read().decode("utf-8", "replace")
    lines = said.rpartition("Fatal Python error")[0].strip() or said.strip()
    return lines.rpartition("\n")[2][:300]


def outcome(tests: Sequence[dict[str, Any]], errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a group's tests, and the names of what failed."""
    found: dict[str, Any] = {}
    ended = [test for test in tests if "test" in test]
    counts = Counter(test["outcome"] for test in ended)
    collected = sum(test.get("collected", 0) for test in tests)
    if ended or collected:
        found = {"passed": counts["passed"], "skipped": counts["skipped"]}
        found["failed"] = [test["test"] for test in ended if test["outcome"] == "failed"]
        found["not ended"] = collected - len(ended)
    if errors:
        found["errors"] = len(errors)
    return found


def is_bad(entry: dict[str, Any]) -> bool:
    return not entry["status"].startswith(("ok", "left out"))


class Clocks:
    """nvidia-smi beside the run: clocks, power and temperature twice a second."""

    FIELDS = (
        "timestamp",
        "clocks.sm",
        "power.draw",
        "temperature.gpu",
        "clocks_event_reasons.active",
        "clocks.mem",
    )

    def __init__(self, path: Path) -> None:
        program = shutil.which("nvidia-smi")
        self._path, self._process = path, None
        if program is not None:
            words = [program, f"--query-gpu={','.join(self.FIELDS)}", "--format=csv,noheader,nounits"]
            with path.open("w") as file:
                words += ["--loop-ms=500", "--id=0"]
                self._process = subprocess.Popen(words, stdout=file, stderr=subprocess.DEVNULL)

    def between(self, start: float, end: float) -> dict[str, float]:
        """Medians of what was read from `start` to `end`, times as `time.time` gives them."""
        rows = []
        for row in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            cells = [cell.strip() for cell in row.split(",")]
            with contextlib.suppress(ValueError):
                when = datetime.datetime.strptime(cells[0], "%Y/%m/%d %H:%M:%S.%f").timestamp()
                if start <= when <= end and len(cells) == len(self.FIELDS):
                    rows.append([float(cell) for cell in cells[1:4]])
        names = ("sm_mhz", "watts", "celsius")
        return {name: median(column) for name, column in zip(names, zip(*rows, strict=True), strict=False)}

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=10)


def check(
    plan: Sequence[Group], run: Run, *, budget: float, faulty: float, head: dict[str, Any]
) -> dict[str, Any]:
    """Run the groups within `budget` seconds, or within `faulty` once one was bad; the record, kept after each."""
    began = time.monotonic()
    record: dict[str, Any] = {}

    def keep() -> None:
        nonlocal record
        record = {
            "format": FORMAT,
            **head,
            "seconds": round(time.monotonic() - began, 1),
            "groups": run.groups,
        }
        record |= run.records.collected()
        for fact in record["facts"]:
            if "machine" in fact:
                record["machine"] = {
                    **fact["machine"],
                    **{k: v for k, v in head["machine"].items() if v is not None},
                }
        write(run.folder / "record.json", record)

    def leave_out(group: Group, why: str) -> None:
        run.groups.append(
            {"group": group.name, "what": group.what, "status": f"left out: {why}", "seconds": 0}
        )

    done = 0
    try:
        for group in plan:
            bad = any(map(is_bad, run.groups))
            deadline = began + (min(budget, faulty) if bad else budget)
            if deadline - time.monotonic() < MIN_SECONDS:
                leave_out(group, "something was wrong" if bad and faulty < budget else "no time left")
            else:
                run.group(group, deadline)
                keep()
            done += 1
            if done == 1 and run.device == "cuda":
                run.try_dumps()
    except BaseException:
        # The open group says "running"; those behind it have not begun.
        if run.groups and run.groups[-1]["status"] == "running":
            run.groups[-1]["status"] = "interrupted"
        for group in plan[len(run.groups) :]:
            leave_out(group, "interrupted")
        raise
    finally:
        run.finish()
        keep()
    return record
