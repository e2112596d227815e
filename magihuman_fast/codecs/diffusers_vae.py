"""What the two autoencoders taken from diffusers share: their files, and filling them with weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..model.weights import check_dense

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def find_diffusers_folder(path: Path) -> Path | None:
    """`path` or its `vae/`, whichever holds an autoencoder as diffusers saves it, or None."""
    folders = (path, path / "vae")
    return next((f for f in folders if (f / CONFIG_FILE).is_file() and (f / WEIGHTS_FILE).is_file()), None)


def diffusers_files(path: Path) -> list[Path]:
    """Where `find_diffusers_folder` looks."""
    return [folder / name for folder in (path, path / "vae") for name in (CONFIG_FILE, WEIGHTS_FILE)]


def lookup(config: object, name: str) -> Any:
    """The value at a dotted name, such as `model.pretransform.type`, of parsed JSON; None where there is none."""
    for key in name.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def check_config(config: object, expected: Mapping[str, Any], where: object) -> None:
    """Raise one `CheckpointError` naming every dotted field of `config` that is not as `expected`."""
    found = {name: lookup(config, name) for name in expected}
    wrong = [
        f"{name} (expected {value!r}, got {found[name]!r})"
        for name, value in expected.items()
        if found[name] != value or isinstance(found[name], bool) != isinstance(value, bool)
    ]
    if wrong:
        raise CheckpointError(f"{where}: not supported: {', '.join(wrong)}")


def fill(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """Give a module built on the meta device its weights, for inference; the caller has checked the shapes."""
    module.load_state_dict(dict(weights), assign=True)
    return module.eval().requires_grad_(False)


def copy_weight(
    name: str, tensor: torch.Tensor, device: torch.device | str, dtype: torch.dtype, where: object
) -> torch.Tensor:
    """Copy a checkpoint tensor to `device` and `dtype`; an integer one is a `CheckpointError`."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"{where}: {name}: expected floating point, got {tensor.dtype}")
    check_dense(name, tensor, where)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{where}: {name}: expected finite values, got NaN or infinity")
    # A copy even where nothing changes: a view would keep the mapped file open for the life of the model.
    return tensor.to(device=device, dtype=dtype, copy=True).contiguous()
