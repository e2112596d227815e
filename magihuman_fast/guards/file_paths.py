"""Names of files to read and to write: refused before any work is done, and written aside, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError, MagiHumanError, OutputError

PathLike = str | os.PathLike[str]


def require_input(path: PathLike, what: str) -> Path:
    """Return `path` if it is a file; `what` it holds is named in the `InputError` otherwise."""
    try:
        path = Path(path)
    except TypeError as error:
        raise InputError(f"{what}: expected a file's name, got {type(path).__name__}") from error
    try:
        if path.is_file():
            if os.access(path, os.R_OK):
                return path
            raise InputError(f"{what} {path}: cannot be read: permission denied")
        found = "a folder" if path.is_dir() else "something that is no file" if path.exists() else "nothing"
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{what} {path}: cannot be read: {error}") from error
    raise InputError(f"{what} {path}: expected a file, found {found}")


def check_output_path(path: PathLike, suffix: str = ".mp4") -> Path:
    """Return `path` if a file of that name can be written; ask before any work is done.

    Raises:
        OutputError: wrong suffix, `path` is a folder, or its folder is missing or not writable.
    """
    try:
        path = Path(path)
    except TypeError as error:
        raise OutputError(f"expected a file's name, got {type(path).__name__}") from error
    if path.suffix.lower() != suffix:
        raise OutputError(f"{path}: expected a name that ends in {suffix}, got {path.name!r}")
    try:
        if not path.parent.is_dir():
            raise OutputError(f"{path}: expected an existing folder, got {path.parent}")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path}: expected a file name, found a folder or device of that name")
    except OutputError:
        raise
    except (OSError, ValueError) as error:  # a ValueError for a zero byte
        raise OutputError(f"{path}: cannot be written: {error}") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: expected a writable folder, got {path.parent}")
    return path


@contextmanager
def atomic_output(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it becomes `path`, on any failure it is removed.

    Raises:
        OutputError: for any `OSError` of the body or of the renaming.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial{path.suffix}")
    try:
        try:
            # Created here: an existing file is never written to, and permissions follow the umask.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except MagiHumanError:
        raise
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
