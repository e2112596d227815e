"""Prompts as they come: from a file, standard input or the command line, all read alike."""

from __future__ import annotations

import codecs
import select
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError

MAX_BYTES = 1 << 20
_MARK = "\ufeff"
# The longer marks first: that of UTF-32 begins with that of UTF-16.
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_prompt(path: Path) -> str:
    """The text in a file, or on standard input where `path` is "-", as `plain` gives it.

    UTF-8 with or without a byte-order mark, or UTF-16 or UTF-32 with one, as PowerShell writes them.

    Raises:
        InputError: it cannot be read, is no text, or is larger than a prompt can be.
    """
    name = f"prompt file {path}"
    try:
        if str(path) != "-":
            with path.open("rb") as file:
                data: bytes | str = file.read(MAX_BYTES + 1)
        elif sys.stdin is None:
            raise InputError(f"{name}: expected text on stdin, got no stdin")
        else:  # whoever has replaced it may have done so by text
            data = _whole(getattr(sys.stdin, "buffer", sys.stdin))
    except (OSError, ValueError) as error:  # a closed file is a ValueError, and so is InputError
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name}: cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise InputError(f"{name}: expected at most {MAX_BYTES} bytes of text, got more")
    return plain(_decoded(data, name) if isinstance(data, bytes) else data)


def _whole(stream: Any) -> bytes | str:
    """All of a stream that may not wait for what is not there yet, up to one more than is allowed."""
    parts: list[Any] = []
    while (total := sum(map(len, parts))) <= MAX_BYTES:
        part = stream.read(MAX_BYTES + 1 - total)
        if part is None:
            select.select([stream], [], [])
        elif part:
            parts.append(part)
        else:
            break
    return type(parts[0])().join(parts) if parts else b""


def _decoded(data: bytes, name: str) -> str:
    encoding = next((encoding for mark, encoding in _ENCODINGS if data.startswith(mark)), "utf-8")
    expected = "text in UTF-8, or in UTF-16 with a byte-order mark"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: expected {expected}: {error}") from error
    if "\0" in text:
        raise InputError(f"{name}: expected {expected}, got a zero byte")
    return text


def plain(text: str) -> str:
    """`text` without a byte-order mark and blanks around it, every line ended by a newline alone."""
    return text.strip().removeprefix(_MARK).replace("\r\n", "\n").replace("\r", "\n").strip()
