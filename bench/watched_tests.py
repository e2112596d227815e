"""Tests inside a forked child: each says when it begins and how it ends, and leaves what its failure shows.

A failed test may have broken the device for its process. So the child asks after each failure whether the device still
answers, and leaves where it does not: its parent goes on behind that test in a new child.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import fork_server
from records import Child

TESTS = Path(__file__).resolve().parent.parent / "python_tests"
sys.path.insert(0, str(TESTS))  # what the tests share
OPTIONS = ("-s", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider")


class Watch:
    """A pytest plugin that keeps the tests whose id matches `select`, and records them."""

    def __init__(self, child: Child, select: str) -> None:
        self._child, self._select = child, re.compile(select)
        self._began = ""
        self._outcome: dict[str, Any] = {}
        self._found = 0

    @pytest.hookimpl(trylast=True)  # behind what deselects by marker
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if self._select.search(item.nodeid)]
        if not self._child.skip:
            self._child.add("test", {"collected": len(chosen)})
        items[:] = [item for item in chosen if item.nodeid not in self._child.skip]

    def mismatch(self, found: Any) -> None:
        """What a check found, as soon as it is found: isolating it further may hang. The last report is the fullest."""
        self._found += 1
        self._child.add("mismatch", {"test": self._began, **found.report})
        if found.tensors:
            self._child.keep_tensors(self._began, found.tensors)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._began, self._outcome = item.nodeid, {"outcome": "passed"}
        self._child.begin(item.nodeid)
        found = yield
        self._child.add("test", {"test": item.nodeid, **self._outcome})
        broken = device_error() if self._outcome["outcome"] == "failed" else None
        if broken is not None:
            # The step stays open: its parent names it.
            self._child.add("fact", {"device lost in": item.nodeid, "error": broken})
            sys.stdout.flush()
            os._exit(fork_server.STICKY)
        self._child.end(item.nodeid)
        return found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, Any, Any]:
        report = yield
        if report.when == "call":
            self._outcome["seconds"] = round(report.duration, 3)
        if report.failed:
            self._outcome |= {"outcome": "failed", "message": str(report.longrepr)[-3000:]}
            error = None if call.excinfo is None else call.excinfo.value
            if hasattr(error, "report") and not self._found:
                self.mismatch(error)
            self._found = 0
        elif report.skipped:
            self._outcome |= {"outcome": "skipped", "message": str(report.longrepr)[-300:]}
        return report


def device_error() -> str | None:
    """Why the device answers no more in this process; None where it does, or none was ever used."""
    if not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)[:500]
    return None


def run(child: Child, files: Sequence[Path], select: str, marker: str) -> None:
    """Run the chosen tests of `files` in this process; exits with pytest's code where something failed."""
    import mismatch

    watch = Watch(child, select)
    mismatch.on_found.append(watch.mismatch)
    code = pytest.main([*OPTIONS, "-m", marker, *map(str, files)], plugins=[watch])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        if child.on_gpu and not child.skip:
            child.add(
                "error",
                {"op": child.group, "shape": "-", "variant": "tests", "error": f"none matches {select}"},
            )
        return
    if code:
        raise SystemExit(int(code))


def preload(files: Sequence[Path]) -> None:
    """Import the tests once, in the parent, so that children begin in milliseconds."""
    if not files:  # pytest would take all that there are
        return
    code = pytest.main(["-qq", "--collect-only", "--no-header", "-p", "no:cacheprovider", *map(str, files)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"the tests cannot be collected: pytest's exit code {int(code)}")
