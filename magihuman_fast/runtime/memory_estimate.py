"""Memory that the reference path needs, estimated from a model's sizes: weights, and the peak of what it computes.

The estimates name the tensors that live at the peak; what allocators, cuBLAS, cuDNN or oneDNN add is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..guards.number_checks import apart
from ..model.config import VAE_STRIDE, VAE_TIME_STRIDE, DiTConfig
from ..model.turbo_vae_config import TurboVAEConfig


@dataclass(frozen=True)
class Model:
    """A diffusion model as it counts here: its sizes and the bytes of its weights in memory."""

    config: DiTConfig
    weight_bytes: int


def tensors_of(component: object) -> Iterator[torch.Tensor]:
    """The tensors that a component holds: directly, in modules, in containers, or in another of our objects."""

    def found(value: object) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
        elif isinstance(value, dict):
            yield from found(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from found(item)
        elif type(value).__module__.startswith(__name__.removesuffix("runtime.memory_estimate")) and hasattr(
            value, "__dict__"
        ):
            yield from found(vars(value))

    if component is not None:
        yield from found(vars(component))


def bytes_text(count: int | None, digits: int = 1) -> str:
    """For people: "4.7 GiB"."""
    if count is None:
        return "unknown"
    power = min(int(math.log(count, 1024)) if count >= 1 else 0, 4)
    return f"{count / 1024**power:.{digits if power else 0}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def bytes_texts(*counts: int) -> list[str]:
    """The same of several that a refusal sets against each other: different ones never read the same."""
    return apart(counts, bytes_text, 1)


def activation_bytes(config: DiTConfig, tokens: int, itemsize: int = 2) -> int:
    """Peak memory of one forward of the reference path, beyond the weights.

    Counted per token: the float32 residual stream (4h) and rotary row, and the larger of
    - attention, while queries are normed and rotated: the normed input, the fused projection and three float32 copies
      of the queries, `itemsize (h + qkvg) + 12h`. The attention itself needs less: there is no L x L matrix.
    - MLP, within the activation: the normed input, and of SwiGLU7 `2W` projected values and two float32 tensors of
      width W, `itemsize (h + 2W) + 8W`; of GELU7 `W` values, a float32 tensor and its rounded copy, `itemsize h + 8W`.

    `itemsize` is that of the layer linears: 2 for bfloat16, 4 for float32.
    """
    h = config.hidden_size
    mlp = max(
        (8 if config.is_gelu(i) else 2 * itemsize + 8) * config.intermediate(i)
        for i in range(config.num_layers)
    )
    attention = itemsize * config.qkvg_rows + 12 * h
    return tokens * (4 * h + 4 * config.rotary_dim + itemsize * h + max(attention, mlp))


def decode_bytes(config: TurboVAEConfig, size: tuple[int, int], frames: int, itemsize: int = 2) -> int:
    """Peak memory of decoding `frames` latent frames to `size` (width, height), beyond the weights.

    That is the norm within a resnet at the largest feature map of a window: its input, the map before the norm, the
    normed map in float32 and its rounded copy; or, of a narrow decoder, the last convolution's result, its copy with
    the patches undone, and two float32 pictures. All finished frames are added.
    """
    width, height = size
    # A window has one latent frame of context on either side where there is one.
    voxels = min(frames, max(config.first_chunk_size + 1, config.step_size + 2)) * (width // VAE_STRIDE)
    voxels *= height // VAE_STRIDE
    largest = config.mid_channels * voxels
    for block in config.up_blocks:
        largest = max(largest, block.in_channels * voxels)
        voxels *= (2 if block.upsample_time else 1) * (4 if block.upsample_space else 1)
        largest = max(largest, block.out_channels * voxels)
    window = max((3 * itemsize + 4) * largest, (2 * itemsize + 8) * config.conv_out_channels * voxels)
    return window + 3 * width * height * (VAE_TIME_STRIDE * (frames - 1) + 1)
