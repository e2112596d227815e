"""A small random Turbo VAE in the published file layout, to try the pipeline without the real weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import OutputError
from ...guards.file_paths import atomic_output
from ...model.turbo_vae import CHECKPOINT_NAME, CONFIG_NAME, STATE_DICT_KEY
from ...model.turbo_vae_config import PUBLISHED_CONFIG, TurboVAEConfig

# Every structure of the published decoder (time and space upsamplers, space only, none; blocks with and without
# a change of channels) at widths that decode a 2 s, 448x256 clip in seconds on a CPU.
TINY_CONFIG: Mapping[str, Any] = {
    **PUBLISHED_CONFIG,
    "decoder_block_out_channels": [8, 8, 16, 16],
    "decoder_layers_per_block": [1, 1, 1, 1, 1],
}

# The last convolution sees values of about 0.6: the picture's standard deviation comes near 0.4, inside [-1, 1].
_CONV_OUT_GAIN = 0.7


def write_turbo_vae(folder: Path, *, config: Mapping[str, Any] | None = None, seed: int = 0) -> None:
    """Write a decoder with random float32 weights to `folder`, laid out as the published `turbo_vae/`.

    The same `config` (default `TINY_CONFIG`) and `seed` give the same weights. Raises `CheckpointError` for a
    config that cannot be served, `OutputError` if a file cannot be written.
    """
    values = dict(TINY_CONFIG if config is None else config)
    shapes = TurboVAEConfig.from_dict(values).state_dict_shapes()
    generator = torch.Generator().manual_seed(seed)
    state_dict: dict[str, torch.Tensor] = {}
    for name, shape in sorted(shapes.items()):
        scale = 0.02 if name.endswith(".bias") else 1 / math.sqrt(math.prod(shape[1:]))
        if name == "decoder.conv_out.conv.weight":
            scale *= _CONV_OUT_GAIN
        state_dict[f"module.{name}"] = scale * torch.randn(shape, generator=generator)
    # Training leaves such heads in the published file; loaders must not trip over them.
    state_dict["module.aligned_feature_projection_heads.0.weight"] = torch.zeros(2, 2)

    folder = Path(folder)
    text = json.dumps(values, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_output(folder / CONFIG_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")
        with atomic_output(folder / CHECKPOINT_NAME) as temporary:
            torch.save({STATE_DICT_KEY: state_dict}, temporary)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a path it cannot open
        raise OutputError(f"{folder}: cannot write the Turbo VAE: {error}") from error
