"""Small sounds and clips for the tests of files."""

from __future__ import annotations

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


def peak_frequency(samples: torch.Tensor, rate: int) -> float:
    spectrum = torch.fft.rfft(samples.double()).abs()
    return float(spectrum.argmax()) * rate / len(samples)


def clip(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 (count, height, width, 3): frame i is a flat grey that rises with i."""
    greys = np.linspace(20, 235, count).astype(np.uint8)
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()
