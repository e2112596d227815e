"""Driving audio: the sound of audio and video files (MODEL.md section 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .file_paths import PathLike, require_input

DRIVING_SAMPLE_RATE = 51200  # of driving audio as the encoder takes it: 25 latents of 2048 samples a second
# A closed list, because other readers do more than read: playlists open other addresses.
_AUDIO_FORMATS = "wav,w64,aiff,au,caf,flac,mp3,aac,ogg,mov,matroska,avi,mpegts"


def load_audio(
    path: PathLike,
    sample_rate: int = DRIVING_SAMPLE_RATE,
    *,
    seconds: float | None = None,
) -> torch.Tensor:
    """Read the first sound track of an audio or video file as float32 `(2, n)`, one channel given twice.

    Its channels are averaged and resampled to `sample_rate`. With `seconds`, decoding stops there;
    the result is shorter where the file is.

    Raises:
        InputError: no such file, no sound in it, or sound that cannot be decoded.
    """
    import av

    path = require_input(path, "audio")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"seconds: expected a positive number, got {seconds}")
    limit = None if seconds is None else round(seconds * sample_rate)
    options = {"format_whitelist": _AUDIO_FORMATS, "protocol_whitelist": "file"}
    parts: list[np.ndarray[Any, Any]] = []
    try:
        with av.open(str(path.absolute()), options=options) as container:
            if not container.streams.audio:
                raise InputError(f"audio {path}: expected a sound track, found none")
            # Channels are averaged here: for floats libswresample's own downmix sums them at 0.7 each.
            resampler = av.AudioResampler(format="fltp", rate=sample_rate)
            total = 0
            for frame in _with_flush(container.decode(container.streams.audio[0])):
                for out in resampler.resample(frame):
                    parts.append(out.to_ndarray().mean(axis=0, dtype=np.float32))
                    total += len(parts[-1])
                if limit is not None and total >= limit:
                    break
    except InputError:
        raise
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InputError(f"audio {path}: cannot be decoded: {error}") from error
    if not sum(map(len, parts)):
        raise InputError(f"audio {path}: expected sound, found an empty track")
    mono = torch.from_numpy(np.concatenate(parts)[:limit])
    if not torch.isfinite(mono).all():
        raise InputError(f"audio {path}: expected finite samples, found NaN or infinity")
    return mono.repeat(2, 1)


def _with_flush(frames: Iterator[Any]) -> Iterator[Any]:
    yield from frames
    yield None
