"""Configuration of the Turbo VAE decoder: the published JSON fields, and the structure they describe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import CheckpointError
from .config import LATENT_CHANNELS, VAE_STRIDE, VAE_TIME_STRIDE

logger = logging.getLogger(__name__)

# The published file, field by field.
PUBLISHED_CONFIG: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLTurboVAED",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 48,
    "patch_size": 2,
    "patch_size_t": 1,
    "use_unpatchify": True,
    "decoder_block_out_channels": [64, 128, 256, 512],
    "decoder_layers_per_block": [2, 2, 2, 3, 3],
    "decoder_spatio_temporal_scaling": [False, True, True, True],
    "decoder_spatio_only": [False, True, False, False],
    "decoder_causal": False,
    "decoder_is_dw_conv": [False, False, False, False, False],
    "decoder_dw_kernel_size": 5,
    "resnet_norm_eps": 1e-06,
    "scaling_factor": 1,
    "aligned_feature_projection_mode": "conv-2layer",
    "aligned_feature_projection_dim": [[512, 1024], [512, 1024]],
    "aligned_blks_indices": [0, 1],
    "spatial_compression_ratio": 16,
    "temporal_compression_ratio": 4,
    "first_chunk_size": 7,
    "step_size": 7,
}

# Fields of the published file with one supported value, and those that do not concern the decoder.
_FIXED: dict[str, Any] = {"patch_size_t": 1, "use_unpatchify": True, "decoder_causal": False}
_FIXED_IF_PRESENT: dict[str, Any] = {
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1,
    "spatial_compression_ratio": VAE_STRIDE,
    "temporal_compression_ratio": VAE_TIME_STRIDE,
}
_WITHOUT_EFFECT = {"_class_name", "_diffusers_version", "in_channels", "decoder_dw_kernel_size"}

# Far above any real decoder; a hostile file must not make us loop or allocate without end.
_MAX_CHANNELS, _MAX_RESNETS, _MAX_CHUNK = 1 << 16, 64, 1 << 10


@dataclass(frozen=True)
class UpBlock:
    """One decoder stage: a resnet where the channels change, an upsampler, then the other resnets."""

    in_channels: int
    out_channels: int
    num_resnets: int
    upsample_time: bool
    upsample_space: bool

    @property
    def has_conv_in(self) -> bool:
        return self.in_channels != self.out_channels


@dataclass(frozen=True)
class TurboVAEConfig:
    """The fields that shape the decoder, named as in the published file (MODEL.md section 8).

    Lists are ordered from the output side, as published. The defaults are the published 107 M parameter decoder.
    A value that cannot be served is a `CheckpointError`.
    """

    latent_channels: int = LATENT_CHANNELS
    out_channels: int = 3
    patch_size: int = 2
    decoder_block_out_channels: tuple[int, ...] = (64, 128, 256, 512)
    decoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3)
    decoder_spatio_temporal_scaling: tuple[bool, ...] = (False, True, True, True)
    decoder_spatio_only: tuple[bool, ...] = (False, True, False, False)
    first_chunk_size: int = 7
    step_size: int = 7

    def __post_init__(self) -> None:
        _check("latent_channels", self.latent_channels, LATENT_CHANNELS)
        _check("out_channels", self.out_channels, 3)
        for name in ("patch_size", "first_chunk_size", "step_size"):
            _check_int(name, getattr(self, name), _MAX_CHUNK)
        channels = self._check_list("decoder_block_out_channels", None)
        for value in channels:
            _check_int("decoder_block_out_channels", value, _MAX_CHANNELS)
        num_blocks = len(channels)
        for value in self._check_list("decoder_layers_per_block", num_blocks + 1):
            _check_int("decoder_layers_per_block", value, _MAX_RESNETS)
        for name in ("decoder_spatio_temporal_scaling", "decoder_spatio_only"):
            for value in self._check_list(name, num_blocks):
                if not isinstance(value, bool):
                    raise CheckpointError(f"Turbo VAE config: {name} must hold true or false, got {value!r}")
        for scaling, only in zip(self.decoder_spatio_temporal_scaling, self.decoder_spatio_only, strict=True):
            if only and not scaling:
                raise CheckpointError(
                    "Turbo VAE config: decoder_spatio_only must be false where decoder_spatio_temporal_scaling "
                    f"is, got {list(self.decoder_spatio_only)} and {list(self.decoder_spatio_temporal_scaling)}"
                )
        time = 2 ** sum(block.upsample_time for block in self.up_blocks)
        space = self.patch_size * 2 ** sum(block.upsample_space for block in self.up_blocks)
        if (time, space) != (VAE_TIME_STRIDE, VAE_STRIDE):
            raise CheckpointError(
                f"Turbo VAE config: decoder_spatio_temporal_scaling, decoder_spatio_only and patch_size must "
                f"give {VAE_TIME_STRIDE}x in time and {VAE_STRIDE}x in space, got {time}x and {space}x"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TurboVAEConfig:
        """Build from the published JSON: `aligned_*` (training) is ignored, unknown fields too with a log line.

        Raises `CheckpointError` naming every missing field, or the first with an unsupported value: this is the
        decoder with full convolutions, no causality and an unpatchify ending.
        """
        if not isinstance(values, Mapping):
            raise CheckpointError(f"Turbo VAE config: expected a JSON object, got {type(values).__name__}")
        own = [f.name for f in fields(cls)]
        required = [*own, *_FIXED, "decoder_is_dw_conv"]
        missing = [name for name in required if name not in values]
        if missing:
            raise CheckpointError(f"Turbo VAE config: missing fields {missing}")
        known = {*required, *_FIXED_IF_PRESENT, *_WITHOUT_EFFECT}
        unknown = sorted(str(k) for k in values if k not in known and not str(k).startswith("aligned_"))
        if unknown:
            logger.info("Turbo VAE config: ignoring unknown fields %s", unknown)
        for name, expected in (_FIXED | _FIXED_IF_PRESENT).items():
            if name in values:
                _check(name, values[name], expected)
        depthwise = values["decoder_is_dw_conv"]
        if not isinstance(depthwise, list | tuple) or any(value is not False for value in depthwise):
            raise CheckpointError(
                "Turbo VAE config: decoder_is_dw_conv must be a list of false (depthwise-separable convolutions "
                f"are not supported), got {depthwise!r}"
            )
        config = cls(**{name: _as_tuple(values[name]) for name in own})
        if len(depthwise) != len(config.decoder_layers_per_block):
            raise CheckpointError(
                "Turbo VAE config: decoder_is_dw_conv must have as many values as decoder_layers_per_block "
                f"({len(config.decoder_layers_per_block)}), got {len(depthwise)}"
            )
        return config

    @property
    def mid_channels(self) -> int:
        """Channels after `conv_in` and in the mid block (512)."""
        return self.decoder_block_out_channels[-1]

    @property
    def num_mid_resnets(self) -> int:
        return self.decoder_layers_per_block[-1]

    @property
    def up_blocks(self) -> tuple[UpBlock, ...]:
        """The stages in the order they run: the published lists reversed."""
        outs = self.decoder_block_out_channels[::-1]
        ins = (self.mid_channels, *outs[:-1])
        scaling, only = self.decoder_spatio_temporal_scaling[::-1], self.decoder_spatio_only[::-1]
        return tuple(
            UpBlock(i, o, n, upsample_time=s and not x, upsample_space=s)
            for i, o, n, s, x in zip(
                ins, outs, self.decoder_layers_per_block[-2::-1], scaling, only, strict=True
            )
        )

    @property
    def conv_out_channels(self) -> int:
        """Channels of `conv_out`: one RGB value for each pixel of a patch (12)."""
        return self.out_channels * self.patch_size**2

    def state_dict_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every key of the published state dict, `decoder.` included, with its shape (80 keys)."""
        shapes: dict[str, tuple[int, ...]] = {}

        def conv(name: str, c_out: int, c_in: int, *kernel: int) -> None:
            shapes[f"decoder.{name}.weight"] = (c_out, c_in, *kernel)
            shapes[f"decoder.{name}.bias"] = (c_out,)

        def resnet(name: str, c_in: int, c_out: int) -> None:
            conv(f"{name}.conv1.conv", c_out, c_in, 3, 3, 3)
            conv(f"{name}.conv2.conv", c_out, c_out, 3, 3, 3)
            if c_in != c_out:
                conv(f"{name}.conv_shortcut.conv", c_out, c_in, 1, 1, 1)

        conv("conv_in.conv", self.mid_channels, self.latent_channels, 3, 3, 3)
        for j in range(self.num_mid_resnets):
            resnet(f"mid_block.resnets.{j}", self.mid_channels, self.mid_channels)
        for i, block in enumerate(self.up_blocks):
            c = block.out_channels
            if block.has_conv_in:
                resnet(f"up_blocks.{i}.conv_in", block.in_channels, c)
            if block.upsample_time:
                conv(f"up_blocks.{i}.upsamplers.0.time_conv.conv", 2 * c, c, 3, 1, 1)
            if block.upsample_space:
                conv(f"up_blocks.{i}.upsamplers.0.resample.1", c, c, 3, 3)
            for j in range(block.num_resnets):
                resnet(f"up_blocks.{i}.resnets.{j}", c, c)
        conv("conv_out.conv", self.conv_out_channels, self.decoder_block_out_channels[0], 3, 3, 3)
        return shapes

    def _check_list(self, name: str, length: int | None) -> tuple[Any, ...]:
        value = getattr(self, name)
        expected = "at least one value" if length is None else f"{length} values"
        if not isinstance(value, tuple):
            raise CheckpointError(f"Turbo VAE config: {name} must be a list of {expected}, got {value!r}")
        if not value or (length is not None and len(value) != length):
            raise CheckpointError(f"Turbo VAE config: {name} must have {expected}, got {len(value)}")
        return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(name: str, value: Any, expected: Any) -> None:
    # bool is an int in Python: without the first test, true would pass for 1.
    if isinstance(value, bool) is not isinstance(expected, bool) or value != expected:
        raise CheckpointError(f"Turbo VAE config: {name} must be {expected!r}, got {value!r}")


def _check_int(name: str, value: Any, at_most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        raise CheckpointError(
            f"Turbo VAE config: {name} must be an integer from 1 to {at_most}, got {value!r}"
        )
