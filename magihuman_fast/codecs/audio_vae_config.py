"""Which autoencoders `audio_vae` supports, and the sizes it reads from their configuration files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from ..errors import CheckpointError
from ..model.config import AUDIO_CHANNELS, SAMPLE_RATE
from .diffusers_vae import check_config, lookup

SAMPLES_PER_LATENT = 2048
_MODEL = "model.pretransform.config"
_SUPPORTED: dict[str, Any] = {
    "sample_rate": SAMPLE_RATE,
    "audio_channels": 2,
    "model.pretransform.type": "autoencoder",
    f"{_MODEL}.encoder.type": "oobleck",
    f"{_MODEL}.encoder.config.in_channels": 2,
    f"{_MODEL}.encoder.config.latent_dim": 2 * AUDIO_CHANNELS,
    f"{_MODEL}.encoder.config.use_snake": True,
    f"{_MODEL}.decoder.type": "oobleck",
    f"{_MODEL}.decoder.config.out_channels": 2,
    f"{_MODEL}.decoder.config.latent_dim": AUDIO_CHANNELS,
    f"{_MODEL}.decoder.config.use_snake": True,
    f"{_MODEL}.decoder.config.final_tanh": False,
    f"{_MODEL}.bottleneck.type": "vae",
    f"{_MODEL}.latent_dim": AUDIO_CHANNELS,
    f"{_MODEL}.downsampling_ratio": SAMPLES_PER_LATENT,
    f"{_MODEL}.io_channels": 2,
}
# Options the published file does not set; any other value than these changes what is computed.
_SUPPORTED_DEFAULTS: dict[str, Any] = {
    "model.pretransform.scale": 1.0,
    f"{_MODEL}.encoder.config.antialias_activation": False,
    f"{_MODEL}.decoder.config.antialias_activation": False,
    f"{_MODEL}.decoder.config.use_nearest_upsample": False,
}
_FIELDS = (
    f"{_MODEL}.encoder.config.channels",
    f"{_MODEL}.decoder.config.channels",
    f"{_MODEL}.encoder.config.c_mults",
    f"{_MODEL}.encoder.config.strides",
)
_SUPPORTED_DIFFUSERS: dict[str, Any] = {
    "_class_name": "AutoencoderOobleck",
    "audio_channels": 2,
    "decoder_input_channels": AUDIO_CHANNELS,
    "sampling_rate": SAMPLE_RATE,
}
_DIFFUSERS_FIELDS = ("encoder_hidden_size", "decoder_channels", "channel_multiples", "downsampling_ratios")


@dataclass(frozen=True)
class Architecture:
    """Widths and strides of one autoencoder."""

    encoder_channels: int
    decoder_channels: int
    multiples: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def from_fields(cls, config: object, names: Sequence[str], where: object) -> Architecture:
        """Read the four fields at dotted `names`; a value no model could have is a `CheckpointError`."""
        encoder, decoder, multiples, strides = (lookup(config, name) for name in names)
        for name, value, low in zip(names, (encoder, decoder, multiples, strides), (1, 1, 1, 2), strict=True):
            numbers = value if isinstance(value, list) and name in names[2:] else [value]
            if not numbers or not all(type(n) is int and low <= n <= 4096 for n in numbers):
                raise CheckpointError(f"{where}: {name}: expected integers in {low}..4096, got {value!r}")
        if not isinstance(multiples, list) or not isinstance(strides, list) or len(multiples) != len(strides):
            raise CheckpointError(
                f"{where}: {names[2]} and {names[3]}: expected lists of one length, "
                f"got {multiples!r} and {strides!r}"
            )
        if prod(strides) != SAMPLES_PER_LATENT:
            raise CheckpointError(
                f"{where}: {names[3]}: expected a product of {SAMPLES_PER_LATENT}, got {strides!r}"
            )
        return cls(encoder, decoder, tuple(multiples), tuple(strides))

    @property
    def decoder_reach(self) -> int:
        """Latents on either side that reach into the samples of one (11 for the published strides)."""
        reach, rate = 3.0 + 1.0, 1  # first convolution; rounding
        for stride in reversed(self.strides):
            reach += 1 / rate  # transposed convolution
            rate *= stride
            reach += (3 + 9 + 27) / rate  # three dilated convolutions of 7 taps
        return ceil(reach + 3 / rate)


def published_architecture(config: object, where: object) -> Architecture:
    """Sizes from a parsed `model_config.json`; one that computes something else is a `CheckpointError`."""
    optional = {
        name: value for name, value in _SUPPORTED_DEFAULTS.items() if lookup(config, name) is not None
    }
    check_config(config, _SUPPORTED | optional, where)
    arch = Architecture.from_fields(config, _FIELDS, where)
    same = {
        f"{_MODEL}.decoder.config.c_mults": list(arch.multiples),
        f"{_MODEL}.decoder.config.strides": list(arch.strides),
    }
    check_config(config, same, where)
    return arch


def diffusers_architecture(config: object, where: object) -> Architecture:
    """Sizes from a parsed diffusers `config.json`; an autoencoder of another kind is a `CheckpointError`."""
    check_config(config, _SUPPORTED_DIFFUSERS, where)
    return Architecture.from_fields(config, _DIFFUSERS_FIELDS, where)
