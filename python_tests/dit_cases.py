"""Diffusion models for tests: those of the golden files, and a small one with random weights."""

from __future__ import annotations

import torch

from backends import device_of
from cases import GOLDEN, Golden, draw_weights
from magihuman_fast.checkpoints.synthetic import random_dit_tensors
from magihuman_fast.kernels import ops
from magihuman_fast.model.config import DiTConfig
from magihuman_fast.model.dit import DiT
from magihuman_fast.runtime.dit import KernelDiT

NAMES = sorted(path.stem for path in (GOLDEN / "dit").glob("*.safetensors"))
# Three published features in three layers: experts with GELU7, one expert, experts in the layer that drops the text.
CONFIG = DiTConfig(
    num_layers=3,
    hidden_size=256,
    num_query_groups=1,
    text_in_channels=64,
    mm_layers=(0, 2),
    gelu7_layers=(0,),
)


def golden_model(golden: Golden, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> DiT:
    config = DiTConfig.from_dict(golden.json("arch"))
    weights = draw_weights(config.state_dict_shapes(), golden.meta)
    return DiT.from_state_dict(config, weights, dtype=dtype, device=device)


def random_model(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> DiT:
    return DiT.from_state_dict(CONFIG, dict(random_dit_tensors(CONFIG)), device=device, dtype=dtype)


def kernel_model(backend: ops.Backend) -> KernelDiT:
    return KernelDiT(random_model(device_of(backend)), backend=backend)


def inputs(golden: Golden) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    text = golden.batch0("in.text")[: int(golden["in.text_len"])]
    return golden.batch0("in.video"), golden.batch0("in.audio"), text


def frame_window(golden: Golden) -> int | None:
    return int(golden.meta["frame_receptive_field"]) if golden.json("arch")["local_attn_layers"] else None
