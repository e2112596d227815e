"""magihuman_fast: daVinci-MagiHuman, from a prompt to a video of a speaking person with sound.

Importing the package is instant and changes nothing; its parts, and torch with them, are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    Cancelled,
    CheckpointError,
    InputError,
    InsufficientMemory,
    MagiHumanError,
    OutputError,
)

if TYPE_CHECKING:
    from . import sampler
    from .audio_vae import AudioVAE
    from .config import DiTConfig
    from .generation import GenerationResult
    from .image_encoder import ImageEncoder
    from .picture_files import load_image
    from .pipeline import MagiHumanPipeline
    from .reference.dit import DiT
    from .sound_files import load_audio
    from .text_encoder import TextEncoder
    from .turbo_vae import TurboVAE

__version__ = "0.1.0"

_MODULES = {
    "AudioVAE": "audio_vae",
    "DiT": "reference.dit",
    "DiTConfig": "config",
    "GenerationResult": "generation",
    "ImageEncoder": "image_encoder",
    "MagiHumanPipeline": "pipeline",
    "TextEncoder": "text_encoder",
    "TurboVAE": "turbo_vae",
    "load_audio": "sound_files",
    "load_image": "picture_files",
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
    "InsufficientMemory",
    "MagiHumanError",
    "MagiHumanPipeline",
    "OutputError",
    "TextEncoder",
    "TurboVAE",
    "load_audio",
    "load_image",
    "sampler",
]


def __getattr__(name: str) -> Any:
    if name == "sampler":
        return import_module(".sampler", __name__)
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
