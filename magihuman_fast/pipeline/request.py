"""Checks of one request, made before any of its work (sizes, lengths, steps, driving sound)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..codecs.sound_files import DRIVING_SAMPLE_RATE, load_audio
from ..errors import InputError
from ..guards.file_paths import PathLike
from ..guards.number_checks import as_integer, as_real, check_seed, value_text
from ..model import config, sampler
from ..model.config import SuperResolution, Variant

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A checked request: length, (width, height) of both stages, their steps, and the seed, as Python's own numbers."""

    seconds: float
    size: tuple[int, int]
    sr_size: tuple[int, int]
    steps: int
    sr_steps: int
    seed: int

    @staticmethod
    def latent_shape(frames: int, size: tuple[int, int]) -> tuple[int, ...]:
        return (config.LATENT_CHANNELS, frames, size[1] // config.VAE_STRIDE, size[0] // config.VAE_STRIDE)


def _snapped(name: str, size: tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, Iterable) else ()
    if len(pair) != 2:
        raise InputError(f"{name}: expected width and height, got {value_text(size)}")
    sides = []
    for given in pair:
        side = as_integer(given)
        if side is None or not config.MIN_SIDE <= side <= config.MAX_SIDE:
            raise InputError(
                f"{name}: expected sides of {config.MIN_SIDE} to {config.MAX_SIDE} pixels, got {value_text(given)}"
            )
        sides.append(side)
    snapped = (config.snap_size(sides[0]), config.snap_size(sides[1]))
    if snapped != tuple(sides):
        log.warning("%s %dx%d becomes %dx%d, a multiple of %d", name, *sides, *snapped, config.SIZE_STEP)
    return snapped


def check_request(
    variant: Variant,
    sr: SuperResolution | None,
    seconds: float,
    width: int,
    height: int,
    seed: int,
    steps: int | None,
    sr_steps: int | None,
    sr_size: tuple[int, int] | None,
) -> Request:
    low, high = config.MIN_SECONDS, config.MAX_SECONDS
    length = as_real(seconds)
    if length is None or not low <= length <= high:
        raise InputError(
            f"seconds: expected {low:g} to {high:g}, got {value_text(seconds if length is None else length)}"
        )
    size = _snapped("size", (width, height))
    if sr is None and (sr_size is not None or sr_steps is not None):
        raise InputError("sr_size, sr_steps: this pipeline was loaded without sr=")
    target = size
    if sr is not None:
        target = config.super_resolution_size(*size, sr) if sr_size is None else _snapped("sr_size", sr_size)
        if max(target) > config.MAX_SIDE or target[0] < size[0] or target[1] < size[1]:
            raise InputError(
                f"size: super-resolution makes {target[0]}x{target[1]} of {size[0]}x{size[1]}; expected no side "
                f"smaller than before and none over {config.MAX_SIDE}"
            )
    return Request(
        seconds=length,
        size=size,
        sr_size=target,
        steps=sampler.check_steps(variant.steps if steps is None else steps),
        sr_steps=0 if sr is None else sampler.check_steps(sr.steps if sr_steps is None else sr_steps),
        seed=check_seed(seed),
    )


def _covered(seconds: float) -> tuple[float, int, float]:
    """`seconds`, the frames of a clip that covers them, and how long these last."""
    frames = config.clip_frames(seconds)
    return seconds, frames, frames / config.FPS


def load_driving_audio(
    audio: PathLike | np.ndarray | torch.Tensor | None,
    seconds: float,
    while_waiting: Callable[[], object] = lambda: None,
) -> torch.Tensor | None:
    """Driving sound as (2, n) float32 at 51200 Hz, at most `seconds` long; without any, None."""
    frames = config.clip_frames(seconds)
    if audio is None:
        if frames > round(config.FPS * seconds, 6):
            log.warning("%g s are no whole frames: the clip has %d and lasts %g s", *_covered(seconds))
        return None
    rate = DRIVING_SAMPLE_RATE
    if isinstance(audio, (str, os.PathLike)):
        a_little_more = seconds + 0.1  # enough to see that there is more
        waveform = load_audio(audio, seconds=a_little_more, while_waiting=while_waiting)
    else:
        try:
            waveform = torch.as_tensor(audio)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"audio: expected a file, an array or a tensor: {error}") from error
        dense = waveform.layout == torch.strided and not waveform.is_meta
        if not dense or waveform.ndim != 2 or waveform.shape[0] != 2 or not waveform.is_floating_point():
            raise InputError(
                f"audio: expected float (2, n) at {rate} Hz, got {tuple(waveform.shape)} {waveform.dtype}"
            )
        waveform = waveform.float()
    limit = round(seconds * rate)
    if waveform.shape[1] > limit:
        log.warning("the driving sound is longer than %g s and is cut there", seconds)
    waveform = waveform[:, :limit]
    length = waveform.shape[1] / rate
    if length < config.MIN_SECONDS:
        # Rounded down: what is just too short must not read as long enough.
        got = math.floor(length * 1000) / 1000
        raise InputError(f"audio: expected at least {config.MIN_SECONDS:g} s, got {got:.3f} s")
    if config.clip_frames(length) < frames:
        log.warning(
            "the driving sound lasts %.3f s: the clip has %d frames and lasts %g s, not %g s",
            *(*_covered(length), seconds),
        )
    if not torch.isfinite(waveform).all():
        raise InputError("audio: expected finite samples, got NaN or infinity")
    return waveform
