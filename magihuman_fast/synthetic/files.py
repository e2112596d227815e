"""Writing safetensors files whose failures and permissions are those of any other file."""

from __future__ import annotations

from collections.abc import Mapping
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
