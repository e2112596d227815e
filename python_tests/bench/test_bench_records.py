"""What measurements become: records of a run that is cut short, the report, and which kernels have changed since."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import records
import report
import sources
import timing
from magihuman_fast.kernels import ops
from timing import Ceilings, Result, Timing

BENCH = Path(timing.__file__).parent


def a_result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "op": "gemm_residual",
        "shape": "256p: 4110 x 5120 x 5120",
        "variant": "kernel",
        "timing": Timing(300e-6, 299e-6, 302e-6, 21, 16, 2, "CUDA events, graph replay"),
        "flops": 2 * 4110 * 5120 * 5120,
        "nbytes": 263_000_000,
        "device": "cuda",
    }
    return Result(**(values | changes))


def test_result_line_and_round_trip() -> None:
    slower = a_result(variant="cuBLAS", timing=dataclasses.replace(a_result().timing, seconds=330e-6))
    found = a_result().with_peak(Ceilings(4.3e12, 790e12, "")).against(slower)
    assert found.line() == (
        "gemm_residual (256p: 4110 x 5120 x 5120): 300.0 us | 718 TFLOP/s | 877 GB/s | 90.9 % | 1.100 x cuBLAS"
    )
    assert slower.line().startswith("gemm_residual, cuBLAS (256p: ")
    assert Result.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_and_whether_it_is_dirty(tmp_path: Path) -> None:
    assert timing.describe_commit(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("1")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-q", "-m", "first")
    found = timing.describe_commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert timing.describe_commit(tmp_path) == {"commit": found["commit"], "dirty": True}


def test_the_machine_is_described() -> None:
    machine = timing.describe_machine()
    assert machine["torch"] == torch.__version__
    json.dumps(machine)


def test_name_of_the_results_file() -> None:
    machine = {"gpu": "NVIDIA H200", "commit": "0123456789abcdef", "dirty": True}
    assert records.default_path(machine).name == "h200-0123456789-dirty.json"
    assert records.default_path({"gpu": None, "commit": None, "dirty": None}).name == "no-gpu-unknown.json"


# --- sources and report ---------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two kernels that share a header, one of them with a header of its own; and files that belong to neither."""
    launcher = '#include "{}"\n\nvoid launch_{}(const Params& p, Stream stream) {{\n}}\n'
    files = {
        "csrc/api.h": "",
        "csrc/binding.cpp": "",
        "csrc/common/shared.h": "",
        "csrc/gemm/own.cuh": '#include "common/shared.h"\n',
        "csrc/gemm/gemm.cu": launcher.format("own.cuh", "gemm"),
        "csrc/pointwise/norm.cu": launcher.format("common/shared.h", "rms_norm"),
        "csrc/sim/machine.h": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def a_record(root: Path, *results: Result, **machine: Any) -> dict[str, Any]:
    described = {"gpu": "NVIDIA H200", "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-01"}
    described |= {"torch": "2.11.0", "cuda": "13.0", "nvcc": "13.0"}
    record: dict[str, Any] = {"format": 2, "rehearsal": False, "machine": described | machine}
    record |= {"sources": sources.digests(root), "groups": []}
    record |= {name: [] for name in records.KINDS.values()}
    return record | {"results": [{"group": "products-256p", **result.to_dict()} for result in results]}


def test_sources_follow_includes(tree: Path) -> None:
    assert sources.kernel_sources(tree) == {
        "gemm": ["csrc/common/shared.h", "csrc/gemm/gemm.cu", "csrc/gemm/own.cuh"],
        "rms_norm": ["csrc/common/shared.h", "csrc/pointwise/norm.cu"],
    }


def test_every_operation_has_sources() -> None:
    found = sources.kernel_sources(timing.ROOT)
    assert set(found) == set(ops.__all__) - {
        "AttentionBackend",
        "Backend",
        "ConvOptions",
        "PixelOutputs",
        "QkvGate",
        "gpu_unavailable",
        "simulator",
    }
    assert "csrc/gemm/mainloop.cuh" in found["gemm_qkv"]
    assert not [name for name in found["rms_norm"] if name.startswith("csrc/gemm/")]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_stale_kernels(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "first")
    assert report.stale([], tree) == dict.fromkeys(["gemm", "rms_norm"], report.NOT_RUN)
    record = a_record(tree, a_result(op="gemm"), a_result(op="rms_norm"), **timing.describe_commit(tree))
    assert report.stale([record], tree) == {}
    (tree / "csrc/api.h").write_text("// another operation\n")
    (tree / "csrc/sim/machine.h").write_text("// slower\n")
    assert report.stale([record], tree) == {}
    (tree / "csrc/gemm/own.cuh").write_text('#include "common/shared.h"\n// faster\n')
    git(tree, "commit", "-q", "-a", "-m", "second")
    found = report.stale([record], tree)
    assert list(found) == ["gemm"]
    assert found["gemm"].startswith(f"changed since NVIDIA H200, {record['machine']['commit'][:10]}")
    assert found["gemm"].endswith(": csrc/gemm/own.cuh")
    (tree / "csrc/common/shared.h").write_text("// changed\n")
    assert list(report.stale([record], tree)) == ["gemm", "rms_norm"]
    # A newer run of one kernel clears that one.
    newer = a_record(tree, a_result(op="gemm"), date="2026-02-01")
    assert list(report.stale([record, newer], tree)) == ["rms_norm"]


def test_a_cpu_run_is_no_gpu_run(tree: Path) -> None:
    record = a_record(tree, a_result(op="gemm", device="cpu"), a_result(op="gemm", variant="cuBLAS"))
    assert report.stale([record], tree)["gemm"] == report.NOT_RUN


def test_table_beside_the_targets(tree: Path) -> None:
    fast = a_result(op="gemm", peak_share=0.95, baseline="cuBLAS", speedup=1.02)
    slow = dataclasses.replace(fast, shape="540p: 16846 x 5120 x 5120", speedup=0.9)
    old = a_record(tree, fast, slow)
    lines = report.kernel_table([old], tree).splitlines()
    assert lines[2] == (
        "| gemm | 256p: 4110 x 5120 x 5120 | 300.0 | 718 | 877 | 95.0 % | 1.020 x cuBLAS | ≥ 0.97 x cuBLAS: met; "
        "≥ 740 TFLOP/s: missed | NVIDIA H200, 0123456789 |"
    )
    assert "≥ 0.97 x cuBLAS: missed |" in lines[3]
    assert lines[4] == "| rms_norm | - | - | - | - | - | - | ≥ 85 % of copy | not yet run on a GPU |"
    beside_another = dataclasses.replace(fast, baseline="CUTLASS pingpong", speedup=0.5)
    assert "≥ 0.97 x cuBLAS: not measured" in report.kernel_table([a_record(tree, beside_another)], tree)
    (tree / "csrc/gemm/own.cuh").write_text("// changed\n")
    assert "| NVIDIA H200, 0123456789; changed since |" in report.kernel_table([old], tree)


def test_a_clip_must_be_decoded_in_time() -> None:
    (target,) = [t for t in report.TARGETS if t.applies("decode_clip", "1080p: 125 frames")]
    assert target.text() == "≤ 2.6 s"
    timing_of = a_result().timing
    for seconds, met in ((2.5, True), (2.7, False)):
        assert target.met(a_result(timing=dataclasses.replace(timing_of, seconds=seconds))) is met


def test_a_decode_is_made_of_the_convolutions() -> None:
    found = report.operations(timing.ROOT)
    assert found["decode_clip"] == found["decode_window"]
    assert set(found["conv_picture"]) < set(found["decode_window"])


def test_report_prints_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    picture = tmp_path / "plot.png"
    assert report.main(["--results", str(folder), "--plot", str(picture)]) == 0
    assert f"gemm: {report.NOT_RUN}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    cublas = a_result(op="gemm", variant="cuBLAS", peak_share=0.9)
    record = a_record(
        timing.ROOT, a_result(op="gemm", peak_share=0.9, speedup=1.0, baseline="cuBLAS"), cublas
    )
    (folder / "h200").mkdir()
    (folder / "h200" / "record.json").write_text(json.dumps(record))
    assert report.main(["--results", str(folder), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "| gemm, cuBLAS | 256p: 4110 x 5120 x 5120 | 300.0 |" in out
    assert f"\ngemm: {report.NOT_RUN}" not in out
    assert report.main(["--results", str(folder), "--markdown"]) == 0
    assert "gemm, cuBLAS" not in capsys.readouterr().out


def test_scripts_run_from_any_folder(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCH / "report.py"), "--markdown"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("| kernel | shape |")
