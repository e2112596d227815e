"""What tests compile is made once, anew when anything that it is made of has changed, and never half."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import built_once
from built_once import COMPILER, CSRC, DAY, FLAGS, run, with_included


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(built_once, "KEPT", tmp_path / "kept")
    return tmp_path / "kept"


def test_it_is_made_anew_when_its_parts_change(folder: Path, tmp_path: Path) -> None:
    source, made = tmp_path / "source", []

    def make(target: Path) -> None:
        made.append(target)
        target.write_text(source.read_text())

    for text, word, times in (
        ("a", "-O1", 1),
        ("a", "-O1", 1),
        ("b", "-O1", 2),
        ("b", "-O2", 3),
        ("a", "-O1", 3),
    ):
        source.write_text(text)
        assert built_once.built_once("x.o", [word, source], make).read_text() == text
        assert len(made) == times


def test_what_fails_leaves_nothing_that_counts(folder: Path) -> None:
    def fail(target: Path) -> None:
        target.write_text("half")
        raise AssertionError("the compiler says no")

    with pytest.raises(AssertionError, match="says no"):
        built_once.built_once("x.o", ["-O1"], fail)
    assert built_once.built_once("x.o", ["-O1"], lambda target: target.touch()).read_text() == ""


def test_what_nobody_has_used_for_a_day_goes(folder: Path) -> None:
    kept = [built_once.built_once("x.o", [word], lambda target: target.touch()) for word in ("1", "2")]
    os.utime(kept[0], (0, time.time() - DAY - 60))
    built_once.built_once("x.o", ["2"], lambda target: target.touch())
    assert [path.exists() for path in kept] == [False, True]


@pytest.mark.parametrize(
    "source",
    [*sorted(CSRC.glob("*/tests/sim_library.cpp")), CSRC / "sim" / "tma.cpp"],
    ids=lambda path: path.parent.parent.name,
)
def test_included_files_are_the_compilers(source: Path) -> None:
    rule = run([COMPILER, *FLAGS, "-MM", source]).replace("\\\n", " ")
    names = rule.split(":", 1)[1].split()
    assert {Path(name).resolve() for name in names} <= {path.resolve() for path in with_included(source)}
