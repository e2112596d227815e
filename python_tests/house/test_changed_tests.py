"""What `make check` chooses for what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

import changed_tests
from changed_tests import ROOT, below, chosen, for_file

ALWAYS = ["python_tests/house/test_house.py", "python_tests/house/test_public_interface.py"]


def names(file: str) -> set[str]:
    return {path.name for path in for_file(file)}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("magihuman_fast/codecs/sound_files.py", {"test_sound_files.py"}),
        ("magihuman_fast/model/sampler.py", {"test_sampler.py"}),
        ("python_tests/model/test_sampler.py", {"test_sampler.py"}),
        ("csrc/pointwise/head.cu", {"test_pointwise.py"}),
        ("csrc/sim/machine.cpp", {"test_simulator.py"}),
        ("bench/records.py", {"test_bench_records.py"}),
        ("examples/demo/run.py", {"test_examples.py"}),
        ("MODEL.md", set()),
        ("docs/reference.py", set()),
        ("setup.py", {"test_build.py", "test_release.py", "test_wheel.py"}),
        ("Makefile", {"test_build.py", "test_release.py", "test_wheel.py"}),
        ("magihuman_fast/checkpoints/synthetic/__init__.py", {path.name for path in below("checkpoints/")}),
        ("magihuman_fast/codecs/negative_prompt.txt", {path.name for path in below("codecs/")}),
    ],
)
def test_a_file_has_its_tests(file: str, expected: set[str]) -> None:
    assert (ROOT / file).is_file()
    assert names(file) == expected


def test_what_everything_uses_brings_what_is_quick() -> None:
    for file in ("magihuman_fast/__init__.py", "magihuman_fast/errors.py", "python_tests/conftest.py"):
        assert names(file) >= {"test_ops.py", "test_sampler.py", "test_number_checks.py"}, file


def test_every_file_of_the_repository_has_an_answer() -> None:
    for path in ROOT.rglob("*"):
        if path.is_file() and path.relative_to(ROOT).parts[0] not in (
            ".git",
            ".venv",
            "build",
            "dist",
            "demo",
        ):
            for_file(path.relative_to(ROOT).as_posix())


def test_what_tests_share_brings_those_that_use_it() -> None:
    assert names("python_tests/conv_cases.py") >= {"test_conv.py", "test_conv_tiles.py"}
    assert "test_sampler.py" not in names("python_tests/conv_cases.py")
    assert names("python_tests/built_once.py") >= {"test_attention.py", "test_machine_code.py"}


def test_a_module_without_tests_brings_those_of_its_users() -> None:
    assert "test_audio_vae.py" in names("magihuman_fast/codecs/diffusers_vae.py")
    assert "test_gemm.py" not in names("magihuman_fast/codecs/diffusers_vae.py")


def test_every_kernel_has_tests() -> None:
    for source in (ROOT / "csrc").rglob("*.c*"):
        assert for_file(source.relative_to(ROOT).as_posix()), source


def test_the_choice() -> None:
    assert chosen([]) == ALWAYS
    assert chosen(["magihuman_fast/model/sampler.py"]) == [*ALWAYS, "python_tests/model/test_sampler.py"]
    for name in chosen(None):  # nobody knows what has changed
        assert (ROOT / name).exists()


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert changed_tests.changed_files() is None
