"""The run on a GPU, rehearsed without one: planted faults, the plan, the kit's commands, what the parent may not do."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import core_dump
import fork_server
import gpu_check
import gpu_kit
import gpu_plan
import gpu_run
import kernel_cases
import report
from records import Child, Records
from timing import Ceilings

BENCH = Path(gpu_check.__file__).parent
# Every package that a bare GPU machine lacks; those in the kit are there from it.
ABSENT = (
    "av",
    "soundfile",
    "zstandard",
    "cutlass_library",
    "fastapi",
    "uvicorn",
    "diffusers",
    "importlib_metadata",
)

CLIPS = [group.name for group in gpu_plan.PLAN if group.name.startswith("clip")]


def rehearse(folder: Path, *words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """In a process of its own: it forks, and must not have this one's threads."""
    start = f"import sys; sys.path.insert(0, {str(BENCH)!r}); {code or 'pass'}; import gpu_check"
    run = f"{start}; sys.exit(gpu_check.main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "--rehearse", "--out", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_rehearsal_contains_every_planted_fault(tmp_path: Path) -> None:
    """On a bare machine, without any package that it lacks: all but the clips, for which the kit brings diffusers."""
    names = ",".join(g.name for g in gpu_plan.PLAN if g.name not in CLIPS)
    done = rehearse(tmp_path, "--groups", names, code=f"sys.modules.update(dict.fromkeys({ABSENT}))")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "every planted fault was contained and named" in done.stdout
    record = json.loads((tmp_path / "record.json").read_text())
    (found,) = (m for m in record["mismatches"] if m["test"].endswith("test_wrong_numbers"))
    assert found["wrong"] == 128 * 128 + 1
    assert "test_wrong_numbers" in " ".join(torch.load(tmp_path / "tensors.pt"))
    assert len(list(tmp_path.iterdir())) <= 8
    # As after a real run, but that it says what it is, and counts for nothing.
    assert "gemm-wide: ok" in report.summary(record)
    assert "rehearsal: toy sizes" in report.summary(record)
    assert report.load(tmp_path.parent) == []


@pytest.mark.parametrize("plan", ["second", "baselines"])
@pytest.mark.slow
def test_other_plans_can_be_rehearsed(tmp_path: Path, plan: str) -> None:
    done = rehearse(tmp_path, "--plan", plan)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_first_plans_clips_can_be_rehearsed(tmp_path: Path) -> None:
    done = rehearse(tmp_path, "--groups", ",".join(["facts", "ceilings", *CLIPS]))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_seconds_add_up_to_the_budget() -> None:
    """Nothing is cut as long as every group keeps to its seconds."""
    assert sum(group.seconds for group in gpu_plan.PLAN) == gpu_plan.BUDGET
    for plan in gpu_plan.PLANS.values():
        assert sum(group.seconds for group in plan) <= gpu_plan.BUDGET
        assert all(group.stall <= group.seconds for group in plan)


def test_clocks_of_a_group(tmp_path: Path) -> None:
    rows = ["2026/01/02 03:04:05.250, 1980, 200.5, 40, 0x0000000000000000, 3201"]
    rows += ["2026/01/02 03:04:06.250, 1500, 700.0, 60, 0x0000000000000004, 3201", "cut off, 1"]
    (tmp_path / "clocks.csv").write_text("\n".join(rows))
    clocks = gpu_run.Clocks.__new__(gpu_run.Clocks)
    clocks._path = tmp_path / "clocks.csv"
    second = datetime.datetime(2026, 1, 2, 3, 4, 6).timestamp()
    assert clocks.between(second, second + 1) == {"sm_mhz": 1500, "watts": 700, "celsius": 60}
    assert clocks.between(second + 5, second + 6) == {}


@pytest.mark.slow
def test_every_gpu_test_is_in_a_plan_and_every_pattern_finds_some(pytestconfig: pytest.Config) -> None:
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    said = subprocess.run(
        [*words, "python_tests"], capture_output=True, text=True, cwd=pytestconfig.rootpath
    ).stdout
    ids = [line for line in said.splitlines() if "::" in line]
    assert len(ids) > 500
    groups = [g for plan in gpu_plan.PLANS.values() for g in plan if isinstance(g.work, gpu_plan.Tests)]
    found = set()
    for group in groups:
        files = {path.name for path in group.work.paths()}
        mine = {i for i in ids if Path(i.split("::")[0]).name in files and re.search(group.work.gpu, i)}
        assert mine, group.name
        found |= mine
    assert set(ids) - found == set()


def test_contributing_shows_the_plan() -> None:
    assert gpu_plan.table() in (gpu_kit.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_binding_compiles_for_the_machines_python(tmp_path: Path) -> None:
    """By the command of the run; without such an interpreter here, for this one."""
    kernels = gpu_kit.ROOM / gpu_kit.KERNELS
    if not kernels.is_file():
        pytest.skip("nvcc is not installed: there is no library to link")
    python = gpu_kit.python312() or sys.executable
    target = tmp_path / gpu_kit.binding_name(python)
    pybind11 = gpu_kit.package_folder("pybind11") / "include"
    subprocess.run(gpu_kit.binding_command(python, pybind11, kernels, target), check=True)
    (tmp_path / kernels.name).symlink_to(kernels)
    question = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _C; print(_C.gemm)"
    assert subprocess.run([python, "-c", question]).returncode == 0


def test_without_a_gpu_it_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().out == "gpu_check: nothing to do, a Hopper GPU is needed: no nvidia-smi\n"


def test_another_build_is_timed_beside_this_one(tmp_path: Path) -> None:
    plan = gpu_plan.beside(gpu_plan.PLAN, tmp_path / "before")
    names = [group.name for group in plan]
    at = names.index("products-256p")
    assert names[at + 1] == "products-256p-before"
    assert {n for n in names if n.endswith("-before")} == {
        f"{kind}-256p-before" for kind in ("products", "attention", "decoder", "pointwise")
    }
    assert [n for n in names if not n.endswith("-before")] == [group.name for group in gpu_plan.PLAN]
    records = Records(tmp_path / "records.jsonl")
    plan[at + 1].work(Child("group", records, tmp_path / "tensors.pt", device="cpu"))
    assert {found["variant"] for found in records.of("result")} == {"kernel, before"}


def test_what_becomes_of_a_group(tmp_path: Path) -> None:
    """Of one that loses a child in a step, before any, or fails without a step; and of what no time is left for."""

    def loses_one(child: Child) -> None:
        if child.begin("deadly"):
            os._exit(5)
        child.begin("harmless")
        child.end("harmless")

    def fails(child: Child) -> None:
        raise ValueError("without a step")

    works: dict[str, Callable[[Child], None]] = {
        "loses": loses_one,
        "early": lambda _: os._exit(6),
        "fails": fails,
    }
    plan = [gpu_plan.Group(name, 30, name, work) for name, work in works.items()]
    run = gpu_run.Run(tmp_path / "out", "cpu", tmp_path)
    head: dict[str, Any] = {"rehearsal": True, "machine": {}, "sources": {}}
    record = gpu_run.check(plan, run, budget=60, faulty=60, head=head)
    assert [(g["group"], g["status"]) for g in record["groups"]] == [
        ("loses", "failed"),
        ("early", "1 children lost"),
        ("fails", "failed"),
    ]
    faults = [(f["group"], f["how"], f["step"]) for f in record["faults"]]
    assert faults == [("loses", "exit code 5", "deadly"), ("early", "exit code 6", None)]
    assert json.loads((tmp_path / "out" / "record.json").read_text()) == record
    late = gpu_run.Run(tmp_path / "late", "cpu", tmp_path)
    record = gpu_run.check(plan[:1], late, budget=0, faulty=0, head=head)
    assert [g["status"] for g in record["groups"]] == ["left out: no time left"]


def test_a_kernels_time_is_kept_before_its_baselines(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    child = Child("group", records, tmp_path / "tensors.pt", device="cpu")
    case = next(kernel_cases.gemm_cases(kernel_cases.TINY))

    def die() -> Any:
        raise SystemExit("a baseline that takes the child with it")

    case = dataclasses.replace(case, variants=(case.variants[0], kernel_cases.Variant("deadly", die)))
    quick: dict[str, Any] = {"laps": 1, "lap_seconds": 0, "max_seconds": 0}
    with pytest.raises(SystemExit):
        kernel_cases.run_case(
            case, "cpu", Ceilings(1, 1, ""), child.result, child.error, at_once=child.record, **quick
        )
    assert [r["variant"] for r in records.collected()["results"]] == ["reference"]
    # Told again with its ratio it is still one result.
    child.add("result", records.of("result")[0] | {"speedup": 2.0})
    assert [r["speedup"] for r in records.collected()["results"]] == [2.0]


def test_the_last_line_is_not_pythons_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "--- one\n--- two\nFatal Python error: Aborted\n\nCurrent thread:\nExtension modules: numpy\n"
    )
    assert gpu_run.last_line(log) == "--- two"
    log.write_text("--- one\n--- three\n")
    assert gpu_run.last_line(log) == "--- three"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_core_is_asked_for_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a driver and a debugger that are shell scripts."""
    assert core_dump.trigger(tmp_path) == "no pipe: ENOENT"
    os.mkfifo(tmp_path / "pipe")
    assert core_dump.trigger(tmp_path) == "no pipe: ENXIO"
    driver = subprocess.Popen(
        ["sh", "-c", f"head -c 1 {tmp_path}/pipe >{tmp_path}/asked; echo x >{tmp_path}/core"]
    )
    while (reason := core_dump.trigger(tmp_path)) == "no pipe: ENXIO":  # until it has opened its end
        time.sleep(0.01)
    assert reason is None
    assert driver.wait() == 0
    debugger = tmp_path / "cuda-gdb"
    debugger.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
    debugger.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reader = core_dump.start_reading(tmp_path)
    assert not isinstance(reader, str)
    said = core_dump.finish_reading(reader, tmp_path, tmp_path / "hangs.txt", "the kernel")
    assert said.startswith("cuda-gdb: exit code 0")
    text = (tmp_path / "hangs.txt").read_text()
    assert text.startswith("===== the kernel\n-batch\n")
    assert f"target cudacore {tmp_path / 'core'}" in text


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the script says, in one line, instead of running anything."""
    assert gpu_check.main([*words, "--rehearse"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu_check: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.fixture
def forking_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the script does to its own process is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for name in ("OMP_NUM_THREADS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTHONPATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    fork_server.allow_cuda()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("forking_script")
def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its steps would count as done."""
    gpu_run.Run(tmp_path / "out", "cpu", tmp_path)
    assert "expected a new folder" in refused(capsys, "--out", str(tmp_path / "out"))
    (tmp_path / "file").touch()
    assert "expected a new folder" in refused(capsys, "--out", str(tmp_path / "file"))


@pytest.mark.usefixtures("forking_script")
def test_unknown_groups_and_odd_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "got ['none', '']" in refused(capsys, "--groups", "facts,none,")
    for value in ("-5", "nan", "0", "inf", "soon"):
        with pytest.raises(SystemExit) as end:
            gpu_check.main(["--rehearse", "--budget", value])
        assert end.value.code == 2


def test_a_kit_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it is put in place."""
    with pytest.raises(ValueError, match="expected what `make gpu-kit` prepares"):
        gpu_kit.manifest_of(tmp_path)
    (tmp_path / gpu_kit.KERNELS).touch()
    manifest = tmp_path / "manifest.json"
    for text in ("", "[]", "{}", '{"commit": "0"}'):
        manifest.write_text(text)
        with pytest.raises(ValueError, match="expected what `make gpu-kit` prepares"):
            gpu_kit.manifest_of(tmp_path)
    manifest.write_text(json.dumps({"commit": "0", "dirty": False, "tree": gpu_kit.tree_digest()}))
    assert gpu_kit.manifest_of(tmp_path)["commit"] == "0"
    monkeypatch.setattr(gpu_kit, "tree_digest", lambda: "another")
    with pytest.raises(ValueError, match="not made of these sources"):
        gpu_kit.manifest_of(tmp_path)


def test_every_source_counts_for_a_kit(tmp_path: Path) -> None:
    for name in ("csrc/api.h", "csrc/binding.cpp", "csrc/a/b.cuh", "magihuman_fast/x/y.py", "bench/z.py"):
        before = gpu_kit.tree_digest(tmp_path)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("//")
        assert gpu_kit.tree_digest(tmp_path) != before, name


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    def interrupt(child: Child) -> None:
        os.kill(os.getppid(), signal.SIGUSR1)
        time.sleep(60)

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    plan = [gpu_plan.Group(name, 60, name, interrupt) for name in ("open", "behind")]
    run = gpu_run.Run(tmp_path / "out", "cpu", tmp_path)
    before = signal.signal(signal.SIGUSR1, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            gpu_run.check(plan, run, budget=60, faulty=60, head={"machine": {}})
    finally:
        signal.signal(signal.SIGUSR1, before)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert [g["status"] for g in record["groups"]] == ["interrupted", "left out: interrupted"]


# --- forked children ------------------------------------------------------------------------------------------


def test_children_see_cuda_and_their_parent_does_not(tmp_path: Path) -> None:
    there = hasattr(torch._C, "_cuda_getDeviceCount")
    fork_server.forbid_cuda()
    try:
        with pytest.raises(RuntimeError, match="must not touch CUDA"):
            torch.cuda.is_available()

        def look() -> None:
            assert hasattr(torch._C, "_cuda_getDeviceCount") == there
            torch.cuda.is_available()

        ended = fork_server.run_forked(
            look, log=tmp_path / "log", seconds=60, stall=60, heartbeat=tmp_path / "heart"
        )
    finally:
        fork_server.allow_cuda()
    assert ended.how == "ok", (tmp_path / "log").read_text()


def gone(pid: int) -> bool:
    """Within some seconds."""
    for _ in range(1000):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    """However that ends: it may hold a GPU."""
    code = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(BENCH)!r})
import fork_server
folder = Path({str(tmp_path)!r})
def work():
    (folder / "aside").write_text(str(os.getpid()))
    os.rename(folder / "aside", folder / "pid")
    time.sleep(600)
fork_server.run_forked(work, log=folder / "log", seconds=600, stall=600, heartbeat=folder / "heart")
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_childs_children_die_with_it(tmp_path: Path) -> None:
    def leave_one_behind() -> None:
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (tmp_path / "pid").write_text(str(other.pid))

    ended = fork_server.run_forked(
        leave_one_behind, log=tmp_path / "log", seconds=60, stall=60, heartbeat=tmp_path / "heart"
    )
    assert ended.how == "ok"
    assert gone(int((tmp_path / "pid").read_text()))


def test_records_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    child = Child("group", records, tmp_path / "tensors.pt", device="cpu", skip=frozenset({"done before"}))
    assert not child.begin("done before")
    assert child.begin("first")
    child.end("first")
    assert child.begin("second")
    with records.path.open("a") as file:
        file.write('{"group": "group", "kind": "fa')
    records.mend()
    child.add("fact", {"later": True})
    assert records.of("fact") == [{"group": "group", "later": True}]
    assert records.begun_steps("group") == ["first", "second"]
    assert records.open_step("group") == "second"
    assert records.open_step("another") is None
