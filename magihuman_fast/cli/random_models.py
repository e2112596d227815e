"""Whole pipelines with random weights, made where they run: the full size in seconds, without 57 GiB of files."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..checkpoints.synthetic import SIZES
from ..checkpoints.synthetic.audio_vae import write_audio_vae
from ..checkpoints.synthetic.image_vae import write_image_vae
from ..checkpoints.synthetic.text_encoder import write_text_encoder
from ..checkpoints.synthetic.turbo_vae import write_turbo_vae
from ..codecs.audio_vae import AudioVAE
from ..codecs.image_encoder import ImageEncoder
from ..codecs.text_encoder import TextEncoder
from ..guards.number_checks import MAX_SEED, check_seed
from ..kernels.ops import Backend
from ..model.config import SUPER_RESOLUTIONS, VARIANTS, DiTConfig, is_layer_linear
from ..model.dit import DiT, rope_bands, windowed_layers
from ..pipeline.pipeline import MagiHumanPipeline
from ..runtime.turbo_vae import TurboVAE


def random_dit(
    sizes: DiTConfig,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> DiT:
    """A diffusion model drawn on `device`: linears keep the size of what goes through them, norms are near 1.

    Equal seeds give equal weights on one device, and others on another.
    """
    generator = torch.Generator(device).manual_seed(check_seed(seed))
    weights = {}
    for name, shape in sizes.state_dict_shapes().items():
        if name.endswith("rope.bands"):
            weights[name] = rope_bands(sizes, device)
            continue
        # Norm weights are offsets from 1.
        scale = 0.1 if "norm" in name else 0.02 if name.endswith(".bias") else 1 / math.sqrt(shape[1])
        tensor = torch.empty(shape, dtype=dtype if is_layer_linear(name) else torch.float32, device=device)
        weights[name] = tensor.normal_(std=scale, generator=generator)
    return DiT.from_state_dict(sizes, weights, device=device, dtype=dtype)


def random_turbo_vae(
    size: str = "full",
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    backend: Backend | None = None,
) -> TurboVAE:
    """A video decoder of one of `SIZES` with random weights, the same on every device."""
    with TemporaryDirectory() as folder:
        write_turbo_vae(Path(folder), config=SIZES[size].turbo_vae, seed=seed)
        return TurboVAE.from_pretrained(folder, device=device, dtype=dtype, backend=backend)


def random_pipeline(
    size: str = "full",
    *,
    variant: str = "distill",
    sr: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    images: bool = False,
    seed: int = 0,
    kernels: bool | None = None,
    backend: Backend | None = None,
) -> MagiHumanPipeline:
    """A pipeline of one of `SIZES` with random weights. Of the text encoder "full" has only the width.

    `images` makes an image encoder too, which takes longest. `kernels` and `backend` as in `MagiHumanPipeline`.
    """
    sizes, seed = SIZES[size], check_seed(seed)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_audio_vae(root / "audio", channels=sizes.audio_channels, seed=seed)
        write_text_encoder(
            root / "text", hidden=sizes.dit.text_in_channels, layers=sizes.text_layers, seed=seed
        )
        image = None
        if images:
            write_image_vae(
                root / "image", dim=sizes.image_dim, decoder_dim=sizes.image_decoder_dim, seed=seed
            )
            image = ImageEncoder.from_pretrained(root / "image", device=device)
        sound = AudioVAE.from_pretrained(root / "audio", device=device)
        text = TextEncoder.from_pretrained(root / "text", device=device, dtype=dtype)
    decoder: Backend | None = "reference" if kernels is False else None
    turbo = random_turbo_vae(size, device=device, dtype=dtype, seed=seed, backend=decoder)
    sr_sizes = DiTConfig(**vars(sizes.dit) | {"local_attn_layers": windowed_layers(sizes.dit.num_layers)})
    return MagiHumanPipeline(
        dit=random_dit(sizes.dit, device=device, dtype=dtype, seed=seed),
        variant=VARIANTS[variant],
        turbo_vae=turbo,
        audio_vae=sound,
        text_encoder=text,
        image_encoder=image,
        sr_dit=None
        if sr is None
        else random_dit(sr_sizes, device=device, dtype=dtype, seed=(seed + 1) % (MAX_SEED + 1)),
        sr=None if sr is None else SUPER_RESOLUTIONS[sr],
        kernels=kernels,
        backend=backend,
    )
