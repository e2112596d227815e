"""What `info` tells of a machine, on machines that are made up."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from magihuman_fast.kernels.self_check import trust
from magihuman_fast.runtime import environment
from magihuman_fast.runtime.environment import (
    KERNELS,
    REFERENCE,
    KernelPath,
    available_memory,
    codecs,
    cpu_bf16_instructions,
    cuda_devices,
    describe_machine,
    kernel_path,
    library_versions,
)

MEMINFO = "MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:    300 kB\n"
CPUINFO = "model name\t: A CPU \nflags\t\t: avx512f amx_bf16 avx512_bf16x\nmodel name\t: B\nflags\t\t: amx_bf16 bf16\n"


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files below /proc that there are."""
    files = {"meminfo": MEMINFO, "cpuinfo": CPUINFO}
    monkeypatch.setattr(environment, "_read", lambda path: files.get(Path(path).name, ""))
    return files


def test_the_host(proc: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory() == 300 * 1024
    assert cpu_bf16_instructions() == ["amx_bf16", "bf16"]
    cpu = describe_machine()["cpu"]
    assert (cpu["name"], cpu["available_bytes"]) == ("A CPU", 300 * 1024)
    assert cpu["memory_bytes"] > 1 << 26
    own = 0  # this process, of all whose cores can be asked for
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {own: {2, 3, 5}}[process])
    assert describe_machine()["cpu"]["cores"] == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, cores in ((4, 4), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert describe_machine()["cpu"]["cores"] == cores
    proc.clear()
    assert available_memory() is None
    assert cpu_bf16_instructions() == []
    assert describe_machine()["cpu"]["name"]


def test_files_that_cannot_be_read_are_empty(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"a\xffb")
    assert environment._read(tmp_path / "there") == "a\ufffdb"
    assert environment._read(tmp_path / "absent") == ""


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        SimpleNamespace(name="Volta", major=7, minor=5, total_memory=16),
        SimpleNamespace(name="Ampere", major=8, minor=0, total_memory=80),
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    volta = {
        "device": "cuda:0",
        "name": "Volta",
        "compute_capability": "7.5",
        "memory_bytes": 16,
        "bf16": False,
    }
    ampere = {
        "device": "cuda:1",
        "name": "Ampere",
        "compute_capability": "8.0",
        "memory_bytes": 80,
        "bf16": True,
    }
    assert cuda_devices() == [volta, ampere]


def test_path_and_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_path().name == REFERENCE
    known: list[Any] = [None]
    monkeypatch.setattr(environment, "gpu_unavailable", lambda: None)
    monkeypatch.setattr(trust, "known", lambda device: known[0])
    assert kernel_path().name == KERNELS
    assert "their first use checks them" in kernel_path().reason
    known[0] = SimpleNamespace(why_not=lambda part: "wrong" if part == "decoder" else None)
    assert kernel_path("decoder") == KernelPath(REFERENCE, "wrong")
    assert kernel_path().name == KERNELS
    assert "they agree with PyTorch" in kernel_path().reason


def test_libraries_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "LIBRARIES", ("torch", "no-such-library"))
    assert library_versions() == {"torch": torch.__version__, "no-such-library": None}
    monkeypatch.setitem(sys.modules, "av", None)
    assert codecs() == {"libx264": False, "aac": False}
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(codecs_available={"aac"}))
    assert codecs() == {"libx264": False, "aac": True}
