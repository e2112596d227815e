"""What users call stays as it is recorded. Whoever changes it on purpose records it anew
(`python_tests/public_interface.py`) and says so in CHANGELOG.md."""

from __future__ import annotations

import difflib

from public_interface import RECORD, interface


def test_names_signatures_and_options_are_those_recorded() -> None:
    recorded = RECORD.read_text(encoding="utf-8").splitlines()
    changes = list(difflib.unified_diff(recorded, interface(), "recorded", "now", lineterm="", n=0))
    assert not changes, "\n".join(changes)
