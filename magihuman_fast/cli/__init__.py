"""The shell command `magihuman-fast`."""

from .program import main

__all__ = ["main"]
