"""Fixtures shared by the tests."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from magihuman_fast import ops
from magihuman_fast.pipeline import MagiHumanPipeline
from magihuman_fast.synthetic import MODELS, write_checkpoint
from sim_library import build_library


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny synthetic checkpoint with every model; tests that change it copy it first."""
    root = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(root, size="tiny", models=list(MODELS))
    return root


@pytest.fixture(scope="session")
def pipe(tiny_checkpoint: Path) -> MagiHumanPipeline:
    """The distilled pipeline with 540p super-resolution on the CPU."""
    return MagiHumanPipeline.from_pretrained(tiny_checkpoint, sr="540p", device="cpu")


@pytest.fixture(scope="session")
def attention_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build_library("attention", tmp_path_factory.mktemp("attention_library"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a Hopper GPU where there is none, with the reason."""
    if item.get_closest_marker("gpu") is not None:
        reason = ops.gpu_unavailable()
        if reason is not None:
            pytest.skip(f"the kernels cannot run: {reason}")
