"""Tests that a rehearsal runs to see what becomes of a run in which everything goes wrong. Not collected otherwise."""

from __future__ import annotations

import os
import time

import torch

import watched_tests
from mismatch import require_close


def test_right_before() -> None:
    assert int(torch.arange(4).sum()) == 6


def test_hangs() -> None:
    print("the planted kernel never ends", flush=True)
    while True:
        time.sleep(1)


def test_right_between() -> None:
    assert int(torch.arange(5).sum()) == 10


def test_crashes() -> None:
    os.abort()


def test_wrong_numbers() -> None:
    """One tile of 128 x 128 is off, and one value was never written."""
    right = torch.ones(300, 300)
    wrong = right.clone()
    wrong[128:256, 128:256] += 1
    wrong[3, 5] = torch.nan
    require_close("planted", wrong, right, 0.01)


def test_loses_the_device() -> None:
    watched_tests.device_error = lambda: "planted: an illegal memory access was encountered"
    raise AssertionError("planted: a sticky fault")


def test_right_after() -> None:
    assert int(torch.arange(6).sum()) == 15
