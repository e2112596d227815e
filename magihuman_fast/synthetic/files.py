"""Writing safetensors files whose failures and permissions are those of any other file, and folders that are whole."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import OutputError


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write `tensors` over the existing file `path`, keeping its permissions.

    Raises:
        OutputError: the disk is full, or the file cannot be written.
    """
    mode = path.stat().st_mode  # the library puts a new file, for its owner alone, in its place
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    path.chmod(mode)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder in `folder`. On success its files get the same names in `folder`; on any failure it is
    removed, and `folder` too where it was not there before.

    Inside, not beside: `folder` may be where another disk is mounted.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    aside = folder / f".{secrets.token_hex(8)}.partial"
    try:
        aside.mkdir(parents=True)
        yield aside
        for file in sorted(path for path in aside.rglob("*") if path.is_file()):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        made = []
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        for path in made:
            with suppress(OSError):
                path.rmdir()
