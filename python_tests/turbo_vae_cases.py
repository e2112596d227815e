"""Video decoders for tests: the one of the golden files, and a small one with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cases import GOLDEN, Golden, draw_weights
from magihuman_fast.checkpoints.synthetic.turbo_vae import TINY_CONFIG
from magihuman_fast.model.turbo_vae import TurboVAE
from magihuman_fast.model.turbo_vae_config import TurboVAEConfig

PUBLISHED = TurboVAEConfig()
LATENTS = {"256p": (16, 28), "540p": (34, 60), "1080p": (68, 120)}
GOLDEN_CONFIG: dict[str, Any] = json.loads((GOLDEN / "turbo_vae/a.json").read_text())


@cache
def golden_weights(*meta: tuple[str, str]) -> dict[str, Tensor]:
    return draw_weights(TurboVAEConfig.from_dict(GOLDEN_CONFIG).state_dict_shapes(), dict(meta))


def golden_model(golden: Golden, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TurboVAE:
    weights = golden_weights(*sorted((k, v) for k, v in golden.meta.items() if k.startswith("weights.")))
    return TurboVAE.from_state_dict(GOLDEN_CONFIG, weights, dtype=dtype, device=device)


def tiny_state_dict(config: Mapping[str, Any] = TINY_CONFIG) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = TurboVAEConfig.from_dict(config).state_dict_shapes()
    return {k: 0.2 * torch.randn(s, generator=generator) for k, s in shapes.items()}


def random_latent(*shape: int) -> Tensor:
    return torch.randn(48, *shape, generator=torch.Generator().manual_seed(3))
