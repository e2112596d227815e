"""Faults are planted in a copy of what lies in the package, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mutants


def test_a_room_or_a_module() -> None:
    assert mutants.inside_package("pipeline") == Path("pipeline")
    assert mutants.inside_package("codecs/media.py") == Path("codecs/media.py")
    assert mutants.inside_package("magihuman_fast/pipeline/") == Path("pipeline")


@pytest.mark.parametrize("name", ["", ".", "..", "../csrc", "/etc", "errors.py", "nowhere", "codecs/none.py"])
def test_anything_else_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a folder or a module of magihuman_fast that has tests"):
        mutants.inside_package(name)


def test_a_full_path_is_found_in_the_package() -> None:
    """It is taken as one in the copy: never as it stands."""
    name = os.fspath(mutants.ROOT / mutants.PACKAGE / "pipeline" / "request.py")
    assert mutants.inside_package(name) == Path("pipeline/request.py")
