"""magihuman_fast: daVinci-MagiHuman, from a prompt to a video of a speaking person with sound."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import sampler
from .config import DiTConfig
from .errors import Cancelled, CheckpointError, InputError, MagiHumanError, OutputError
from .reference.dit import DiT

if TYPE_CHECKING:
    from .audio_vae import AudioVAE
    from .image_encoder import ImageEncoder
    from .pipeline import GenerationResult, MagiHumanPipeline
    from .reference.turbo_vae import TurboVAE
    from .text_encoder import TextEncoder

__version__ = "0.1.0"

_LAZY = {
    "AudioVAE": "audio_vae",
    "GenerationResult": "pipeline",
    "ImageEncoder": "image_encoder",
    "MagiHumanPipeline": "pipeline",
    "TextEncoder": "text_encoder",
    "TurboVAE": "reference.turbo_vae",
}

__all__ = [
    "AudioVAE",
    "Cancelled",
    "CheckpointError",
    "DiT",
    "DiTConfig",
    "GenerationResult",
    "ImageEncoder",
    "InputError",
    "MagiHumanError",
    "MagiHumanPipeline",
    "OutputError",
    "TextEncoder",
    "TurboVAE",
    "sampler",
]


def __getattr__(name: str) -> Any:
    """Import the heavier parts on first use."""
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
