"""Small sounds and clips for the tests of files."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

RATE = 44100


def tone(seconds: float, rate: int, frequency: float = 440.0, level: float = 0.5) -> np.ndarray:
    """(n,) float32 sine."""
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def stereo(seconds: float, frequency: float = 440.0) -> np.ndarray:
    return np.stack([tone(seconds, RATE, frequency)] * 2, axis=1)


def portrait() -> np.ndarray:
    """uint8 (90, 120, 3): what an image encoder takes, not what anyone would look at."""
    return np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)


def voice(seconds: float, rate: int = 51200) -> torch.Tensor:
    """(2, n) float32, as the pipeline takes it."""
    return torch.from_numpy(tone(seconds, rate, level=0.3)).expand(2, -1)


def peak_frequency(samples: torch.Tensor, rate: int) -> float:
    spectrum = torch.fft.rfft(samples.double()).abs()
    return float(spectrum.argmax()) * rate / len(samples)


def clip(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 (count, height, width, 3): frame i is a flat grey that rises with i."""
    greys = np.linspace(20, 235, count).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def layout_places(layout: str) -> list[str]:
    return [channel.name for channel in av.AudioLayout(layout).channels]


def wav_bytes(samples: np.ndarray, rate: int, mask: int | None = None) -> bytes:
    """A WAV file of int16 (n, channels), with the places of `mask` or none."""
    channels = samples.shape[1]
    fields = (channels, rate, rate * channels * 2, channels * 2, 16)
    if mask is None:
        head = struct.pack("<HHIIHH", 1, *fields)
    else:
        pcm = bytes.fromhex("0100000000001000800000aa00389b71")
        head = struct.pack("<HHIIHHHHI", 0xFFFE, *fields, 22, 16, mask) + pcm
    data = samples.tobytes()
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


def write_sound(
    path: Path,
    samples: np.ndarray,
    rate: int,
    codec: str,
    *,
    layout: str = "",
    form: str = "",
    **options: Any,
) -> None:
    """Write float samples (n,) or (n, channels) as one track of `codec`, in sample format `form`.

    Frames go in packed and are converted by ffmpeg: PyAV cannot fill planes of more than eight channels.
    """
    samples = samples.astype(np.float64).reshape(len(samples), -1)
    layout = layout or {1: "mono", 2: "stereo"}[samples.shape[1]]
    form = form or str(av.Codec(codec, "w").audio_formats[0].name)
    with av.open(str(path), "w", **options) as out:
        track = out.add_stream(codec, rate=rate, layout=layout, format=form)
        if codec.startswith("wma"):
            track.bit_rate = 128_000
        resampler = av.AudioResampler(
            format=form, layout=layout, rate=rate, frame_size=track.frame_size or 1024
        )
        frame = av.AudioFrame(format="dbl", layout=layout, samples=len(samples))
        frame.planes[0].update(np.ascontiguousarray(samples).tobytes())
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for converted in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(track.encode(converted))
        out.mux(track.encode(None))


_DECODE = """\
import os, sys
from magihuman_fast.codecs.sound_decoder import read
for path in sys.argv[1:]:
    with open(path + ".f32", "wb") as out:
        out.write(read(path, 51200, 51200)[0])
os._exit(0)
"""


def decode_together(paths: Sequence[Path]) -> list[torch.Tensor]:
    """What `load_audio` makes of each file, in one child for all of them."""
    subprocess.run([sys.executable, "-c", _DECODE, *map(str, paths)], check=True)
    return [torch.from_numpy(np.fromfile(f"{path}.f32", np.float32)) for path in paths]
