"""Error measures shared by the tests."""

from __future__ import annotations

import math

import torch


def rel_err(out: torch.Tensor, ref: torch.Tensor) -> float:
    """Relative L2 error ||out - ref|| / ||ref|| in float64; any NaN or infinity in `out` counts as infinite."""
    assert out.shape == ref.shape, f"shape {tuple(out.shape)} against {tuple(ref.shape)}"
    out, ref = out.detach().double(), ref.detach().double()
    if not torch.isfinite(out).all():
        return math.inf
    return float((out - ref).norm() / ref.norm())
