"""How much disk a synthetic checkpoint takes, known before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ...model.config import is_layer_linear
from ...model.turbo_vae_config import TurboVAEConfig
from . import MODELS, SIZES
from .audio_vae import audio_vae_shapes
from .image_vae import wan_vae_shapes

_TEXT_FILES = 100_000  # bytes of tokenizer, configurations and indices, about


def checkpoint_bytes(size: str, models: Sequence[str]) -> int:
    """Bytes `write_checkpoint` writes for one of `SIZES` and some of `MODELS`, to within a few per cent."""
    sizes = SIZES[size]
    total = _TEXT_FILES
    for model in models:
        for name, shape in sizes.dit.state_dict_shapes().items():
            total += math.prod(shape) * (MODELS[model][2].itemsize if is_layer_linear(name) else 4)
    turbo = TurboVAEConfig.from_dict(sizes.turbo_vae).state_dict_shapes().values()
    image = wan_vae_shapes(sizes.image_dim, sizes.image_decoder_dim).values()
    audio = audio_vae_shapes(sizes.audio_channels).values()
    total += 4 * sum(_count(shapes) for shapes in (turbo, image, audio))
    # Text: encoder and decoder layers of three projections h x 2h (attention is narrow beside them), in bfloat16.
    return total + 2 * (2 * sizes.text_layers) * 3 * 2 * sizes.dit.text_in_channels**2


def _count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(map(math.prod, shapes))
