"""Numbers as callers give them, numpy's included, and texts in which two of them do not look alike."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TypeVar

from ..errors import InputError

N = TypeVar("N", int, float)
MAX_SEED = 2**64 - 1
_MAX_SHOWN = 100  # characters of a value in a message


def value_text(value: object) -> str:
    """`value` for a message: shortened, and also where Python refuses to print so many digits."""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def as_integer(value: object) -> int | None:
    """`value` as an int, if it is an integer of any library and no boolean."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return int(operator.index(value))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # of tensors and arrays too
        return None


def as_real(value: object) -> float | None:
    """`value` as a float, if it is a real number of any library and no boolean."""
    whole = as_integer(value)
    if whole is None and (isinstance(value, bool) or not isinstance(value, Real)):
        return None
    try:
        return float(value if whole is None else whole)  # type: ignore[arg-type]
    except (OverflowError, TypeError, ValueError):  # of numpy's times, which call themselves real
        return None


def integer_between(name: str, value: object, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`; an `InputError` names what else it is."""
    number = as_integer(value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name}: expected an integer from {low} to {high}, got {value_text(value)}")
    return number


def check_seed(seed: object) -> int:
    """`seed` as an int, if torch's generators take it."""
    number = as_integer(seed)
    if number is None or not 0 <= number <= MAX_SEED:
        raise InputError(f"seed: expected an integer from 0 to 2^64 - 1, got {value_text(seed)}")
    return number


def apart(values: Sequence[N], text: Callable[[N, int], str], digits: int) -> list[str]:
    """`text(value, digits)` of each, with more digits where different values would look alike."""
    texts: list[str] = []
    for places in range(digits, 20):
        texts = [text(value, places) for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts
