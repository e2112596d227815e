"""Sound in: files become mono sound at 51200 Hz or an error that names them."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from magihuman_fast import media
from magihuman_fast.errors import InputError
from magihuman_fast.sound_files import load_audio
from media_cases import clip, peak_frequency, stereo, tone
from numerics import rel_err


class TestAudio:
    @pytest.mark.parametrize("name", ["a.wav", "a.mp3", "a.flac", "a.ogg"])
    def test_channels_are_averaged_and_resampled_to_51200(self, tmp_path: Path, name: str) -> None:
        left_only = np.stack([tone(1.0, 48000, 300.0, level=0.8), np.zeros(48000, np.float32)], axis=1)
        soundfile.write(tmp_path / name, left_only, 48000)
        out = load_audio(tmp_path / name)
        assert out.dtype == torch.float32
        assert out.shape[0] == 2
        assert abs(out.shape[1] - 51200) <= 1600
        assert torch.equal(out[0], out[1])
        middle = out[0, 10_000:40_000]
        assert abs(peak_frequency(middle, 51200) - 300) < 2
        assert abs(float(middle.abs().max()) - 0.4) < 0.02

    def test_resampling_keeps_the_waveform(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(1.0, 44100), 44100, subtype="FLOAT")
        out = load_audio(tmp_path / "a.wav")
        assert out.shape == (2, 51200)
        inner = slice(1000, -1000)
        assert rel_err(out[0, inner], torch.from_numpy(tone(1.0, 51200))[inner]) < 1e-3

    def test_seconds_stops_decoding(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(2.0, 44100), 44100)
        whole = load_audio(tmp_path / "a.wav")
        part = load_audio(tmp_path / "a.wav", seconds=0.3)
        assert part.shape == (2, 15360)
        assert torch.equal(part, whole[:, :15360])
        assert torch.equal(load_audio(tmp_path / "a.wav", seconds=9.0), whole)
        assert load_audio(tmp_path / "a.wav", 16000, seconds=0.5).shape == (2, 8000)

    def test_sound_of_a_video(self, tmp_path: Path) -> None:
        media.write_video(tmp_path / "a.mp4", clip(25), stereo(1.0, 700.0))
        out = load_audio(tmp_path / "a.mp4")
        assert abs(out.shape[1] - 51200) <= 1200  # AAC comes in blocks of 1024 samples at 44100 Hz
        assert abs(peak_frequency(out[0], 51200) - 700) < 2

    def test_unreadable_is_refused_by_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def no_network(*args: object) -> None:
            pytest.fail("the network was used")

        monkeypatch.setattr(socket.socket, "connect", no_network)
        media.write_video(tmp_path / "silent.mp4", clip(3), None)
        soundfile.write(tmp_path / "no_samples.wav", np.zeros(0, np.float32), 44100)
        soundfile.write(tmp_path / "nan.wav", np.full(9000, np.nan, np.float32), 44100, subtype="FLOAT")
        soundfile.write(tmp_path / "a.wav", tone(0.2, 44100), 44100)
        (tmp_path / "text.mp3").write_text("no sound")
        (tmp_path / "empty.wav").touch()
        (tmp_path / "folder.wav").mkdir()
        lists = {
            "list.m3u8": "#EXTM3U\n#EXTINF:1,\na.wav\n",
            "list.ffconcat": "ffconcat version 1.0\nfile a.wav\n",
        }
        for name, content in lists.items():
            (tmp_path / name).write_text(content)
        names = [
            "silent.mp4",
            "no_samples.wav",
            "nan.wav",
            "text.mp3",
            "empty.wav",
            "folder.wav",
            "missing.wav",
        ]
        for name in [*names, *lists]:
            with pytest.raises(InputError, match=f"audio .*{name}"):
                load_audio(tmp_path / name)

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
    def test_bad_length_is_refused(self, tmp_path: Path, seconds: float) -> None:
        soundfile.write(tmp_path / "a.wav", tone(0.2, 44100), 44100)
        with pytest.raises(InputError, match="seconds"):
            load_audio(tmp_path / "a.wav", seconds=seconds)
