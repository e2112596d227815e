"""A release has one version, and a change log that tells of it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import magihuman_fast

ROOT = Path(__file__).resolve().parents[2]


def test_the_installed_version_is_the_packages() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", magihuman_fast.__version__)
    assert version("magihuman_fast") == magihuman_fast.__version__


def test_the_change_log_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions[0] == magihuman_fast.__version__
    assert f"dist/magihuman_fast-{magihuman_fast.__version__}-*.whl" in (ROOT / "README.md").read_text(
        "utf-8"
    )
    assert versions == sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True)
