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
    from .codecs.audio_vae import AudioVAE
    from .codecs.image_encoder import ImageEncoder
    from .codecs.picture_files import load_image
    from .codecs.sound_files import load_audio
    from .codecs.text_encoder import TextEncoder
    from .kernels import ops
    from .model import sampler
    from .model.config import DiTConfig
    from .model.dit import DiT
    from .pipeline.generation import GenerationResult
    from .pipeline.pipeline import MagiHumanPipeline
    from .runtime.turbo_vae import TurboVAE

__version__ = "0.2.0"

# Where each name comes from; a name without a colon is the module itself.
_PLACES = {
    "AudioVAE": "codecs.audio_vae:AudioVAE",
    "DiT": "model.dit:DiT",
    "DiTConfig": "model.config:DiTConfig",
    "GenerationResult": "pipeline.generation:GenerationResult",
    "ImageEncoder": "codecs.image_encoder:ImageEncoder",
    "MagiHumanPipeline": "pipeline.pipeline:MagiHumanPipeline",
    "TextEncoder": "codecs.text_encoder:TextEncoder",
    "TurboVAE": "runtime.turbo_vae:TurboVAE",
    "load_audio": "codecs.sound_files:load_audio",
    "load_image": "codecs.picture_files:load_image",
    "ops": "kernels.ops",
    "sampler": "model.sampler",
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
    "ops",
    "sampler",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = import_module(f".{module}", __name__)
    return getattr(found, attribute) if attribute else found
