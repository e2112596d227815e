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

from ...errors import OutputError


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
    removed, `folder` is as it was before, and gone where it was not there.

    Inside, not beside: `folder` may be where another disk is mounted.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    aside = folder / f".{secrets.token_hex(8)}.partial"
    replaced = aside.with_name(f".{secrets.token_hex(8)}.replaced.partial")
    moved: list[Path] = []
    try:
        aside.mkdir(parents=True)
        yield aside
        files = sorted(path.relative_to(aside) for path in aside.rglob("*") if path.is_file())
        for name in files:
            if (folder / name).is_dir():
                raise OutputError(f"{folder / name}: expected a file or nothing, found a folder")
        made += {path for name in files for path in (folder / name).parents if not path.exists()}
        try:
            for name in files:
                moved.append(name)
                _move(folder / name, replaced / name)
                _move(aside / name, folder / name)
        except BaseException:
            for name in reversed(moved):
                if not (aside / name).exists():
                    (folder / name).unlink(missing_ok=True)
                _move(replaced / name, folder / name)
            raise
        made = []
    finally:
        for path in (aside, replaced):
            shutil.rmtree(path, ignore_errors=True)
        for path in sorted(made, reverse=True):  # what is inside comes first
            with suppress(OSError):
                path.rmdir()


def _move(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
