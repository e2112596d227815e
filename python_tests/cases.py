"""Golden vectors: inputs and outputs of the published reference, with the weights it ran on drawn anew."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden file: its tensors by name and its metadata strings."""

    tensors: dict[str, torch.Tensor]
    meta: dict[str, str]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def batch0(self, name: str) -> torch.Tensor:
        """The tensor without its leading batch axis of one."""
        return self.tensors[name].squeeze(0)

    def json(self, name: str) -> Any:
        return json.loads(self.meta[name])


def load_golden(name: str) -> Golden:
    """Read `golden/NAME.safetensors`, e.g. `dit/a_v2`."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        names = file.keys()
        return Golden({name: file.get_tensor(name) for name in names}, dict(file.metadata() or {}))


def draw_weights(
    shapes: Mapping[str, tuple[int, ...]],
    meta: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The weights a golden file was computed with, in sorted key order from NumPy's legacy generator.

    Values are rounded to bfloat16, so `dtype` float32 and bfloat16 hold the same numbers. `rope.bands` is computed by
    the model, not drawn: it is returned as the published formula gives it.
    """
    rs = np.random.RandomState(int(meta["weights.seed"]))
    gain, c0, c1 = (float(meta[f"weights.{k}"]) for k in ("gain", "c0", "c1"))
    weights: dict[str, torch.Tensor] = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        if name.endswith("rope.bands"):
            k = torch.arange(shape[0], dtype=torch.float32)
            weights[name] = 10000.0 ** (-k / shape[0])
            continue
        n = rs.standard_normal(size=shape)
        if len(shape) >= 2:
            n *= gain / np.sqrt(np.prod(shape[1:]))
        elif name.endswith("bias"):
            n *= 0.02
        else:
            n = c0 + c1 * n
        weights[name] = torch.from_numpy(n.astype(np.float32)).bfloat16().to(dtype)
    return weights
