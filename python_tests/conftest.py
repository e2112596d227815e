"""Fixtures shared by the tests."""

from __future__ import annotations

import ctypes
import fcntl
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kernel_findings import Checks
from magihuman_fast.checkpoints import loading
from magihuman_fast.checkpoints.synthetic import MODELS, write_checkpoint
from magihuman_fast.cli import program as cli
from magihuman_fast.kernels import ops
from magihuman_fast.kernels.self_check import trust as kernel_trust
from magihuman_fast.pipeline.pipeline import MagiHumanPipeline
from sim_library import build_library

Captured = tuple[int, str, str]


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of this run: where processes share the tests, of all of them."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(request.config, "workerinput") else own


@pytest.fixture(scope="session")
def tiny_checkpoint(run_folder: Path) -> Path:
    """A tiny synthetic checkpoint with every model; tests that change it copy it first."""
    root = run_folder / "checkpoint"
    with (run_folder / "checkpoint.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            aside = run_folder / "checkpoint-aside"
            write_checkpoint(aside, size="tiny", models=list(MODELS))
            aside.rename(root)
    return root


@pytest.fixture(scope="session")
def pipe(tiny_checkpoint: Path) -> MagiHumanPipeline:
    """The distilled pipeline with 540p super-resolution on the CPU."""
    return MagiHumanPipeline.from_pretrained(tiny_checkpoint, sr="540p", device="cpu")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command with arguments: its exit code, stdout and stderr."""

    def call(*argv: object) -> Captured:
        code = cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def loaded(pipe: MagiHumanPipeline, monkeypatch: pytest.MonkeyPatch) -> MagiHumanPipeline:
    """Loading gives the session's pipeline, with some noise on stdout as libraries make it."""

    def load(*args: object, on_load: Any, **options: object) -> MagiHumanPipeline:
        print("a library talks")
        on_load("distill", 1, 2)
        on_load("distill", 2, 2)
        return pipe

    monkeypatch.setattr(MagiHumanPipeline, "from_pretrained", load)
    return pipe


@pytest.fixture
def request_(tiny_checkpoint: Path, tmp_path: Path) -> list[object]:
    """The arguments of the smallest run of `loaded`."""
    small = [
        "--seconds",
        1,
        "--size",
        "64x64",
        "--steps",
        1,
        "--sr",
        "540p",
        "--sr-size",
        "64x64",
        "--sr-steps",
        1,
    ]
    output = ["--output", tmp_path / "out.mp4"]
    return ["generate", "--model", tiny_checkpoint, "--prompt", "A woman speaks.", *output, *small]


@pytest.fixture(scope="session")
def attention_library() -> ctypes.CDLL:
    return build_library("attention")


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which is empty, and nothing known from before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_trust, "_known", {})
    return tmp_path / "cache" / "magihuman_fast"


@pytest.fixture
def made_for(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the GPU of these tests, which nobody has, and its software are called; may be changed."""
    names = {"device": "NVIDIA H200", "uuid": "7", "driver": "575.1", "torch": "2.13", "build": "ab"}
    monkeypatch.setattr(kernel_trust, "_made_for", lambda device, backend: dict(names))
    return names


@pytest.fixture
def kernel_checks(kernel_cache: Path, made_for: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Checks:
    """Kernels that could run anywhere, and checks of them that find what a test wants."""
    found = Checks()
    monkeypatch.setattr(kernel_trust, "check_in_children", found)
    monkeypatch.setattr(ops, "gpu_unavailable", lambda device=None: None)
    monkeypatch.setattr(loading, "gpu_unavailable", lambda device=None: None)
    return found


def pytest_configure() -> None:
    """A shell ignores Ctrl-C in what it runs in the background, and its children inherit that: tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where processes share the tests, the slow ones come first: at the end there are small ones left to share."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a Hopper GPU where there is none, with the reason; there, let PyTorch compute as it says."""
    if item.get_closest_marker("gpu") is not None:
        reason = ops.gpu_unavailable()
        if reason is not None:
            pytest.skip(f"the kernels cannot run: {reason}")
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
