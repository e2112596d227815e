"""What the shell command tells of the kernels, and passes on: `info`, `info --check`, `generate --check-kernels`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kernel_findings import DECODER_FAULT, DECODER_REASON, GPU, MODEL_FAULT, MODEL_REASON, Checks
from magihuman_fast import InputError, MagiHumanPipeline
from magihuman_fast.cli import commands
from magihuman_fast.cli import program as cli
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.self_check import trust as kernel_trust
from magihuman_fast.kernels.self_check.cases import CASES
from magihuman_fast.runtime import environment
from magihuman_fast.runtime.environment import KERNELS, REFERENCE


@pytest.fixture
def gpu_info(kernel_checks: Checks, monkeypatch: pytest.MonkeyPatch) -> Checks:
    """`info` on a machine with one Hopper GPU and one of another kind."""
    devices = [
        {
            "device": f"cuda:{i}",
            "name": name,
            "compute_capability": "9.0",
            "memory_bytes": 2**37,
            "bf16": True,
        }
        for i, name in enumerate(("NVIDIA H200", "NVIDIA L4"))
    ]

    def unavailable(device: Any = None) -> str | None:
        return "no Hopper GPU" if str(device) == "cuda:1" else None

    for module in (environment, commands):
        monkeypatch.setattr(module, "cuda_devices", lambda: devices)
    monkeypatch.setattr(ops, "gpu_unavailable", unavailable)
    monkeypatch.setattr(environment, "gpu_unavailable", unavailable)
    monkeypatch.setattr(kernel_trust, "_numbered", lambda device: GPU)
    return kernel_checks


def info(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(["info", *argv])
    captured = capsys.readouterr()
    assert captured.err == ""
    return code, captured.out


def test_info_tells_what_is_known(gpu_info: Checks, capsys: pytest.CaptureFixture[str]) -> None:
    assert "this is a Hopper GPU; their first use checks them" in info(capsys)[1]
    assert gpu_info.count == 0
    kernel_trust.examine(GPU)
    assert "they agree with PyTorch on this Hopper GPU" in info(capsys)[1]
    gpu_info.faults = (DECODER_FAULT,)
    kernel_trust.examine(GPU, anew=True)
    out = info(capsys)[1]
    assert f"runs            {KERNELS}; " in out
    assert f"decoder         {REFERENCE}; {DECODER_REASON}" in out
    machine = json.loads(info(capsys, "--json")[1])
    assert machine["path"]["name"] == KERNELS
    assert machine["decoder_path"] == {"name": REFERENCE, "reason": DECODER_REASON}


def test_info_checks_by_hand(gpu_info: Checks, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = info(capsys, "--check")
    assert code == 0
    assert "kernels against PyTorch on cuda:0 (NVIDIA H200)" in out
    assert "cuda:1 (" not in out.split("kernels against PyTorch")[1]
    assert out.endswith("all kernels are right\n")
    gpu_info.faults = (MODEL_FAULT, DECODER_FAULT)
    code, out = info(capsys, "--check")
    assert (code, gpu_info.count) == (1, 2)
    lines = [line.split() for line in out.splitlines()]
    assert ["gated_attention,", "window", "128x176", "3", "0.013", "0.00", "wrong"] in lines
    assert ["gemm_gelu7,", "by", "modality", "128x128", "0.001", "0.01", "0.10", "right"] in lines
    assert "\nwrong: conv_picture (bytes): did not end within 20 s\n" in out
    assert f"runs            {REFERENCE}; {MODEL_REASON}" in out
    code, out = info(capsys, "--check", "--json")
    assert code == 1
    (check,) = json.loads(out)["kernel_check"]["devices"]
    assert (check["device"], check["name"], check["right"]) == ("cuda:0", "NVIDIA H200", False)
    assert {kernel["operation"]: kernel for kernel in check["kernels"]}["conv_picture"] == {
        "operation": "conv_picture",
        "form": "bytes",
        "tile": "",
        "part": "decoder",
        "kernel": "conv_picture (bytes)",
        "verdict": "wrong",
        "detail": "did not end within 20 s",
        "error": None,
        "allowed": None,
        "seconds": 0.0,
    }


def test_info_says_why_there_is_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    reason = ops.gpu_unavailable()
    code, out = info(capsys, "--check")
    assert (code, out.splitlines()[-1]) == (0, f"no kernels to check: {reason}")
    assert json.loads(info(capsys, "--check", "--json")[1])["kernel_check"] == {
        "reason": reason,
        "devices": [],
    }
    assert cli.main(["info", "--simulator"]) == 2
    assert "--simulator needs --check" in capsys.readouterr().err


@pytest.mark.slow
def test_info_in_the_simulator(kernel_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing replaced: a child process with all simulated kernels, whose answers are kept."""
    code, out = info(capsys, "--check", "--simulator")
    assert code == 0
    assert "kernels against PyTorch on cpu (simulator)" in out
    assert out.count("  right\n") == len(CASES)
    assert len(list(kernel_cache.iterdir())) == 1
    kernel_trust.forget()
    report = kernel_trust.known("cpu", "sim")
    assert report is not None
    assert report.why_not() is None


@pytest.mark.parametrize(
    ("flag", "value"), [([], None), (["--check-kernels"], True), (["--no-check-kernels"], False)]
)
def test_generate_passes_on_what_to_check(
    flag: list[str],
    value: bool | None,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    def load(*args: object, check_kernels: bool | None, **options: object) -> None:
        seen.append(check_kernels)
        raise InputError("enough")

    monkeypatch.setattr(MagiHumanPipeline, "from_pretrained", load)
    request = ["--model", str(tiny_checkpoint), "--prompt", "Hello.", "--output", str(tmp_path / "out.mp4")]
    assert cli.main(["generate", *request, *flag]) == 2
    assert seen == [value]
