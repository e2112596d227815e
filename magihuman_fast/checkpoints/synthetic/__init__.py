"""Synthetic checkpoints: the complete published layout with random weights, for tests, demos and benchmarks.

What a model with random weights makes is noise; everything around it (loading, shapes, speed, memory) is as with the
published weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, OutputError
from ...guards.number_checks import check_seed
from ...model import config
from ...model.config import DiTConfig
from ...model.turbo_vae_config import PUBLISHED_CONFIG
from .audio_vae import write_audio_vae
from .dit import random_dit_tensors, write_dit
from .files import whole_folder
from .image_vae import write_image_vae
from .text_encoder import write_text_encoder
from .turbo_vae import TINY_CONFIG, write_turbo_vae

OnFile = Callable[[str, int, int], object]

__all__ = ["MODELS", "SIZES", "Size", "random_dit_tensors", "write_checkpoint", "write_dit"]


@dataclass(frozen=True)
class Size:
    """Sizes of all components of one synthetic checkpoint."""

    dit: DiTConfig
    turbo_vae: Mapping[str, Any]
    text_layers: int
    image_dim: int
    image_decoder_dim: int
    audio_channels: int


_TINY = Size(
    dit=DiTConfig(
        num_layers=5,
        hidden_size=256,
        num_query_groups=1,
        text_in_channels=64,
        mm_layers=(0, 4),
        gelu7_layers=(0,),
    ),
    turbo_vae=TINY_CONFIG,
    text_layers=2,
    image_dim=16,
    image_decoder_dim=8,
    audio_channels=4,
)
SIZES = {
    "tiny": _TINY,
    "small": replace(
        _TINY,
        dit=DiTConfig(
            num_layers=10,
            hidden_size=1280,
            num_query_groups=2,
            text_in_channels=256,
            mm_layers=(0, 9),
            gelu7_layers=(0,),
        ),
        image_dim=32,
        image_decoder_dim=32,
        audio_channels=16,
    ),
    # The text encoder keeps few layers: only its width matters to the other parts.
    "full": Size(
        dit=DiTConfig(),
        turbo_vae=PUBLISHED_CONFIG,
        text_layers=2,
        image_dim=160,
        image_decoder_dim=256,
        audio_channels=128,
    ),
}
# name: (folder, shards, dtype of the layer linears), as published
MODELS = {
    "distill": (config.VARIANTS["distill"].folder, 13, torch.float32),
    "base": (config.VARIANTS["base"].folder, 7, torch.bfloat16),
    "540p": (config.SUPER_RESOLUTIONS["540p"].folder, 13, torch.float32),
    "1080p": (config.SUPER_RESOLUTIONS["1080p"].folder, 13, torch.float32),
}


def write_checkpoint(
    root: Path | str,
    *,
    size: str = "tiny",
    models: Sequence[str] = ("distill",),
    seed: int = 0,
    on_file: OnFile | None = None,
) -> None:
    """Write diffusion models, Turbo VAE, text encoder, image VAE and audio VAE below `root`.

    Files appear under their names when all are complete; what ends the writing leaves nothing behind.

    Args:
        size: "tiny" (a few MB, for tests), "small", or "full" (the published sizes, 61 GB a model).
        models: any of "distill", "base", "540p", "1080p". seed: of all weights; equal seeds give equal files.
        on_file: called as (file name, files done, files) while the diffusion models are written.

    Raises:
        InputError: an unknown size or model. OutputError: a file cannot be written.
    """
    if size not in SIZES:
        raise InputError(f"size: expected one of {', '.join(SIZES)}, got {size!r}")
    unknown = [name for name in models if name not in MODELS]
    if unknown or not models:
        raise InputError(f"models: expected some of {', '.join(MODELS)}, got {list(models)}")
    sizes, root, seed = SIZES[size], Path(root), check_seed(seed)
    try:
        with whole_folder(root) as folder:
            _write(folder, sizes, models, seed, on_file)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{root}: cannot write the checkpoint: {error}") from error


def _write(root: Path, sizes: Size, models: Sequence[str], seed: int, on_file: OnFile | None) -> None:
    write_turbo_vae(root / config.TURBO_VAE_FOLDER, config=sizes.turbo_vae, seed=seed)
    write_text_encoder(
        root / config.TEXT_ENCODER_FOLDER,
        hidden=sizes.dit.text_in_channels,
        layers=sizes.text_layers,
        seed=seed,
    )
    write_image_vae(
        root / config.IMAGE_VAE_FOLDER,
        dim=sizes.image_dim,
        decoder_dim=sizes.image_decoder_dim,
        seed=seed,
    )
    write_audio_vae(root / config.AUDIO_VAE_FOLDER, channels=sizes.audio_channels, seed=seed)
    for i, name in enumerate(models):
        folder, shards, dtype = MODELS[name]
        write_dit(
            root / folder,
            sizes.dit,
            seed=seed + i + 1,
            shards=shards,
            linear_dtype=dtype,
            on_file=on_file,
        )
