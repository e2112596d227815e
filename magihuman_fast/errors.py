"""Exceptions a caller can expect. Each message names what was wrong, what was expected and what was found."""

from __future__ import annotations


class MagiHumanError(Exception):
    """Base class of every error raised on purpose by this package."""


class CheckpointError(MagiHumanError, ValueError):
    """A model file is missing, unreadable, or does not hold what the model needs."""


class InputError(MagiHumanError, ValueError):
    """A request (prompt, image, audio, size, seconds, option) cannot be served as given."""


class InsufficientMemory(InputError):
    """Models or a request need more memory than the device has; says what would fit. Nothing has been allocated."""


class OutputError(MagiHumanError, OSError):
    """A result could not be written; nothing was left half-written."""


class Cancelled(MagiHumanError):
    """The caller cancelled a generation between two steps."""
