"""Sound of every layout, sample format, rate and container, held to the mix computed channel by channel."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from magihuman_fast.codecs.sound_files import load_audio
from media_cases import decode_together, layout_places, tone, wav_bytes, write_sound
from numerics import rel_err

RATE = 51200
# What each place counts for in ffmpeg's mix to one channel, before the sum of them is scaled down to one.
HALF_POWER = 0.5**0.5
WEIGHTS = (
    {"FC": 1.0}
    | dict.fromkeys(("FL", "FR", "FLC", "FRC", "TFL", "TFR"), HALF_POWER)
    | dict.fromkeys(("BL", "BR", "BC", "SL", "SR", "TFC"), 0.5)
    | dict.fromkeys(("LFE", "TBL", "TBR"), 0.0)
)
FEW = ("mono", "stereo")
MANY = (
    *FEW,
    *("2.1", "3.0", "3.0(back)", "4.0", "quad", "quad(side)", "3.1", "5.0", "5.0(side)", "4.1", "5.1"),
    *("5.1(side)", "6.0", "hexagonal", "6.1", "6.1(back)", "7.0", "7.1", "7.1(wide)", "octagonal"),
)
# Suffix, codec, sample format, the layouts that the container can say.
LOSSLESS = (
    (".wav", "pcm_u8", "u8", MANY),
    (".wav", "pcm_s16le", "s16", (*MANY, "5.1.4", "7.1.4")),
    (".wav", "pcm_s24le", "s32", MANY),
    (".wav", "pcm_s32le", "s32", MANY),
    (".wav", "pcm_f32le", "flt", (*MANY, "7.1.4")),
    (".wav", "pcm_f64le", "dbl", MANY),
    (".w64", "pcm_s24le", "s32", MANY),
    (".caf", "pcm_s24be", "s32", MANY),
    (".mov", "pcm_s16be", "s16", FEW),
    (".aiff", "pcm_s16be", "s16", FEW),
    (".au", "pcm_f32be", "flt", FEW),
    (".avi", "pcm_s16le", "s16", FEW),
    (".m4a", "alac", "s16p", ("mono", "stereo", "5.1")),
    (".flac", "flac", "s16", ("mono", "stereo", "quad", "5.1", "7.1")),
    (".mka", "flac", "s32", ("mono", "stereo", "quad", "5.1", "7.1")),
    (".wv", "wavpack", "fltp", ("mono", "stereo", "quad", "5.1", "7.1")),
    (".tta", "tta", "s16", FEW),
)
RATES = (8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000)


def chord(channels: int, rate: int, seconds: float = 0.4) -> np.ndarray:
    """(n, channels): in each channel a tone of its own."""
    return np.stack([tone(seconds, rate, 200.0 + 50 * c, level=0.4) for c in range(channels)], axis=1)


def mixed(places: list[str], seconds: float = 0.4) -> torch.Tensor:
    """What `chord` must become, computed at the rate it is wanted at."""
    weights = np.array([WEIGHTS[place] for place in places])
    return torch.from_numpy((chord(len(places), RATE, seconds) * weights / max(1, weights.sum())).sum(axis=1))


def loudness(samples: torch.Tensor, frequency: float) -> float:
    """The level of a tone of `frequency` Hz in `samples`."""
    times = torch.arange(len(samples)) / RATE
    window = torch.hann_window(len(samples), periodic=False)
    turned = samples * window * torch.polar(torch.ones(()), -2 * torch.pi * frequency * times)
    return 2 * float(turned.sum().abs() / window.sum())


def lossless_cases(layouts: tuple[str, ...]) -> list[tuple[str, int]]:
    """Every layout, at rates dealt out in turn, and every rate."""
    deal = random.Random(0)
    return [(layout, deal.choice(RATES)) for layout in layouts] + [(deal.choice(layouts), r) for r in RATES]


class TestMixing:
    @pytest.mark.parametrize("form", LOSSLESS, ids=lambda form: f"{form[1]}{form[0]}")
    def test_every_layout_and_rate(self, tmp_path: Path, form: tuple[str, str, str, tuple[str, ...]]) -> None:
        suffix, codec, sample_format, layouts = form
        cases = lossless_cases(layouts)
        paths = [tmp_path / f"{number}{suffix}" for number in range(len(cases))]
        for path, (layout, rate) in zip(paths, cases, strict=True):
            sound = chord(len(layout_places(layout)), rate)
            write_sound(path, sound, rate, codec, layout=layout, form=sample_format)
        for out, (layout, rate) in zip(decode_together(paths), cases, strict=True):
            expected = mixed(layout_places(layout))
            assert abs(len(out) - len(expected)) <= 2, (layout, rate)
            inner = slice(2000, -2000)  # without the ends, where the tones begin and stop
            worst = float((out[: len(expected)][inner] - expected[: len(out)][inner]).abs().max())
            assert worst < (0.01 if codec == "pcm_u8" else 1e-3), (layout, rate)

    @pytest.mark.parametrize(
        ("suffix", "codec", "layout", "rate", "options"),
        [
            (".mp3", "libmp3lame", "stereo", 44100, {}),
            (".mp3", "mp2", "stereo", 48000, {"format": "mp2"}),
            (".m4a", "aac", "5.1", 48000, {}),
            (".3gp", "aac", "mono", 16000, {}),
            (".aac", "aac", "stereo", 44100, {"format": "adts"}),
            (".flv", "aac", "stereo", 44100, {}),
            (".ts", "aac", "stereo", 48000, {}),
            (".mpg", "mp2", "stereo", 48000, {}),
            (".opus", "libopus", "5.1", 48000, {}),
            (".webm", "libopus", "stereo", 48000, {}),
            (".ac3", "ac3", "5.1(side)", 48000, {}),
            (".eac3", "eac3", "5.1", 48000, {}),
            (".wma", "wmav2", "stereo", 44100, {}),
            (".avi", "libmp3lame", "mono", 24000, {}),
        ],
    )
    def test_lossy_formats(
        self, tmp_path: Path, suffix: str, codec: str, layout: str, rate: int, options: dict[str, Any]
    ) -> None:
        path, places = tmp_path / f"a{suffix}", layout_places(layout)
        write_sound(path, chord(len(places), rate, 1.0), rate, codec, layout=layout, **options)
        out = load_audio(path)[0]
        assert abs(len(out) - RATE) < 4000  # blocks of up to 2048 samples, some of them for the start
        weights = np.array([WEIGHTS[place] for place in places])
        for channel, gain in enumerate(weights / max(1, weights.sum())):
            level = loudness(out[10_000:40_000], 200.0 + 50 * channel)
            assert level == pytest.approx(0.4 * gain, rel=0.06, abs=0.004), (places[channel], level)

    def test_centre_is_louder_and_rumble_is_left_out(self, tmp_path: Path) -> None:
        for place, rms in (("FC", 0.1036), ("LFE", 0.0)):
            samples = np.zeros((8000, 6), np.float32)
            samples[:, layout_places("5.1").index(place)] = tone(1.0, 8000)
            write_sound(tmp_path / "a.wav", samples, 8000, "pcm_s16le", layout="5.1", form="s16")
            assert float(load_audio(tmp_path / "a.wav").pow(2).mean().sqrt()) == pytest.approx(rms, abs=2e-4)

    @pytest.mark.parametrize("channels", [1, 2, 3, 8, 9, 10, 16, 24, 25, 64])
    def test_channels_without_places(self, tmp_path: Path, channels: int) -> None:
        """As many as a usual layout has are taken for it; any other number of them counts alike."""
        samples = np.repeat((tone(1.0, 8000)[:, None] * 32767).astype(np.int16), channels, axis=1)
        (tmp_path / "a.wav").write_bytes(wav_bytes(samples, 8000))
        out = load_audio(tmp_path / "a.wav")[0, 2000:-2000]
        assert rel_err(out, torch.from_numpy(tone(1.0, RATE))[2000:-2000]) < 2e-3

    def test_one_channel_is_itself_whatever_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "a.wav").write_bytes(
            wav_bytes((tone(1.0, 8000) * 32767).astype(np.int16)[:, None], 8000, mask=8)
        )
        assert float(load_audio(tmp_path / "a.wav").abs().max()) == pytest.approx(0.5, abs=0.01)

    def test_too_loud_is_cut_as_published(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(0.5, 44100, level=3.0), 44100, subtype="FLOAT")
        out = load_audio(tmp_path / "a.wav")
        assert (float(out.min()), float(out.max())) == (-1, 1)

    @pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.ogg"])
    def test_other_encoders(self, tmp_path: Path, name: str) -> None:
        left_only = np.stack([tone(1.0, 48000, 300.0, level=0.8), np.zeros(48000, np.float32)], axis=1)
        soundfile.write(tmp_path / name, left_only, 48000)
        out = load_audio(tmp_path / name)
        assert out.dtype == torch.float32
        assert out.shape[0] == 2
        assert abs(out.shape[1] - RATE) <= 1600
        assert torch.equal(out[0], out[1])
        assert loudness(out[0, 10_000:40_000], 300.0) == pytest.approx(0.4, abs=0.01)

    def test_resampling_keeps_the_waveform(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(1.0, 44100), 44100, subtype="FLOAT")
        out = load_audio(tmp_path / "a.wav")
        assert out.shape == (2, RATE)
        inner = slice(1000, -1000)
        assert rel_err(out[0, inner], torch.from_numpy(tone(1.0, RATE))[inner]) < 1e-3

    def test_files_with_an_order_of_their_own(self, tmp_path: Path) -> None:
        """PyAV frees the memory of such an order twice: here it is the decoder's, which ends without freeing it."""
        sound = np.zeros((8000, 8), np.float32)
        sound[:, layout_places("7.1").index("SL")] = tone(1.0, 8000)
        write_sound(tmp_path / "a.caf", sound, 8000, "pcm_s24be", layout="7.1", form="s32")
        share = WEIGHTS["SL"] / sum(WEIGHTS[place] for place in layout_places("7.1"))
        for _ in range(3):
            assert float(load_audio(tmp_path / "a.caf").abs().max()) == pytest.approx(0.5 * share, abs=0.005)
