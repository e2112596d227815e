"""Sound in: files become mono sound at 51200 Hz, mixed as published, or an error that names them."""

from __future__ import annotations

import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from magihuman_fast.codecs import media, sound_files
from magihuman_fast.codecs.sound_files import load_audio
from magihuman_fast.errors import Cancelled, InputError
from magihuman_fast.guards import child_process
from media_cases import clip, layout_places, peak_frequency, stereo, tone, wav_bytes, write_sound
from picture_cases import encoded as encoded_picture

RATE = 51200


def encoded(path: Path, codec: str, frequency: float, rate: int, layout: str, **options: Any) -> bytes:
    """A second of one tone in all channels, as the bytes of a file."""
    samples = np.repeat(tone(1.0, rate, frequency)[:, None], len(layout_places(layout)), axis=1)
    write_sound(path, samples, rate, codec, layout=layout, **options)
    return path.read_bytes()


def hears(out: torch.Tensor, *frequencies: float) -> bool:
    """Whether `out` (2, n) is one tone after the other, each for as long."""
    pieces = out[0].chunk(len(frequencies))
    return all(
        abs(peak_frequency(piece[len(piece) // 4 : -len(piece) // 4], RATE) - frequency) < 10
        for piece, frequency in zip(pieces, frequencies, strict=True)
    )


class TestDamage:
    def test_joined_files_are_heard_to_the_end(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = encoded(tmp_path / "a.mp3", "libmp3lame", 300, 44100, "mono")
        (tmp_path / "joined.mp3").write_bytes(
            first + encoded(tmp_path / "b.mp3", "libmp3lame", 500, 44100, "mono")
        )
        out = load_audio(tmp_path / "joined.mp3")
        assert abs(out.shape[1] - 2 * RATE) < 6000
        assert hears(out, 300, 500)
        (said,) = caplog.messages
        assert "joined.mp3: skipped: 1 of " in said

    @pytest.mark.parametrize(
        ("suffix", "codec", "first", "second", "options"),
        [
            (".mp3", "libmp3lame", (44100, "mono"), (24000, "stereo"), {}),
            (".aac", "aac", (44100, "mono"), (24000, "stereo"), {"format": "adts"}),
            (".ac3", "ac3", (48000, "5.1(side)"), (44100, "stereo"), {}),
            (".ts", "aac", (48000, "stereo"), (24000, "mono"), {}),
        ],
    )
    def test_rate_and_layout_change_on_the_way(
        self,
        tmp_path: Path,
        suffix: str,
        codec: str,
        first: tuple[int, str],
        second: tuple[int, str],
        options: dict[str, Any],
    ) -> None:
        data = encoded(tmp_path / f"a{suffix}", codec, 300, *first, **options)
        data += encoded(tmp_path / f"b{suffix}", codec, 500, *second, **options)
        (tmp_path / f"c{suffix}").write_bytes(data)
        out = load_audio(tmp_path / f"c{suffix}")
        assert abs(out.shape[1] - 2 * RATE) < 8000
        assert hears(out, 300, 500)

    def test_a_track_that_begins_later_is_left_alone(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_sound(tmp_path / "a.flv", tone(20.0, 44100), 44100, "aac")
        picture = (
            b"\x09" + (200).to_bytes(3, "big") + bytes(7) + b"\x22" + bytes(199) + struct.pack(">I", 211)
        )
        (tmp_path / "b.flv").write_bytes((tmp_path / "a.flv").read_bytes() + picture)
        with av.open(str(tmp_path / "b.flv")) as container:
            assert len(container.streams) == 1  # so far from the start is it not seen
        assert torch.equal(load_audio(tmp_path / "b.flv"), load_audio(tmp_path / "a.flv"))
        assert not caplog.messages

    def test_chained_ogg(self, tmp_path: Path) -> None:
        data = encoded(tmp_path / "a.opus", "libopus", 300, 48000, "mono")
        (tmp_path / "c.opus").write_bytes(data + encoded(tmp_path / "b.opus", "libopus", 500, 48000, "mono"))
        out = load_audio(tmp_path / "c.opus")
        assert abs(out.shape[1] - 2 * RATE) < 1000
        assert hears(out, 300, 500)

    def test_what_cannot_be_read_further_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """ffmpeg's reader of Ogg knows no change of channels."""
        data = encoded(tmp_path / "a.opus", "libopus", 300, 48000, "mono")
        (tmp_path / "c.opus").write_bytes(
            data + encoded(tmp_path / "b.opus", "libopus", 500, 48000, "stereo")
        )
        assert load_audio(tmp_path / "c.opus").shape[1] == pytest.approx(RATE, abs=1000)
        assert len(caplog.messages) == 1
        assert "c.opus: cannot be read further after 1.00 s of sound: " in caplog.text

    @pytest.mark.parametrize("where", ["middle", "end"])
    def test_bad_bytes_are_skipped(
        self, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        data = bytearray(encoded(tmp_path / "a.mp3", "libmp3lame", 300, 44100, "mono"))
        junk = np.random.default_rng(0).bytes(3000)
        if where == "middle":
            data[6000:6300] = junk[:300]
        else:
            data += junk
        (tmp_path / "b.mp3").write_bytes(data)
        out = load_audio(tmp_path / "b.mp3")
        assert RATE * 0.7 < out.shape[1] < RATE * 1.1
        assert peak_frequency(out[0, : RATE // 4], RATE) == pytest.approx(300, abs=10)
        with av.open(str(tmp_path / "b.mp3")) as container:
            packets = sum(packet.size > 0 for packet in container.demux(audio=0))
        (message,) = caplog.messages
        assert f" of {packets} packets, which are damaged" in message
        # What comes after the part that is used need not be sound.
        caplog.clear()
        assert load_audio(tmp_path / "b.mp3", seconds=0.2).shape[1] == RATE // 5
        assert not caplog.messages

    def test_nothing_but_damage_is_refused(self, tmp_path: Path) -> None:
        data = bytearray(encoded(tmp_path / "a.m4a", "aac", 300, 44100, "mono"))
        start = data.index(b"mdat") + 4
        data[start : data.index(b"moov") - 4] = b"\xff" * (data.index(b"moov") - 4 - start)
        (tmp_path / "b.m4a").write_bytes(data)
        with pytest.raises(
            InputError, match=r"b\.m4a: cannot be decoded: (\d+) of \1 packets, which are damaged"
        ):
            load_audio(tmp_path / "b.m4a")

    @pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF])
    def test_streamed_wav_without_a_length(self, tmp_path: Path, size: int) -> None:
        data = bytearray(wav_bytes((tone(1.0, 24000) * 32767).astype(np.int16)[:, None], 24000))
        data[40:44] = struct.pack("<I", size)
        (tmp_path / "a.wav").write_bytes(data)
        assert load_audio(tmp_path / "a.wav").shape[1] == RATE

    @pytest.mark.parametrize(
        ("channels", "rate", "message"),
        [
            (65, 8000, "expected 1 to 64 channels, got 65"),
            (1, 10, "expected a sample rate of 1000 to 768000 Hz, got 10"),
            (1, 2_000_000, "expected a sample rate of 1000 to 768000 Hz, got 2000000"),
        ],
    )
    def test_impossible_sound_is_refused(
        self, tmp_path: Path, channels: int, rate: int, message: str
    ) -> None:
        (tmp_path / "a.wav").write_bytes(wav_bytes(np.zeros((2000, channels), np.int16), rate))
        with pytest.raises(InputError, match=rf"a\.wav: {message}"):
            load_audio(tmp_path / "a.wav")

    def test_without_an_end_only_ten_minutes_are_read(self, tmp_path: Path) -> None:
        """Silence packs so well that a small file could fill the memory."""
        write_sound(tmp_path / "a.flac", np.zeros(601 * 8000), 8000, "flac", form="s16")
        with pytest.raises(InputError, match=r"a\.flac: expected at most 600 s of sound, found more"):
            load_audio(tmp_path / "a.flac")
        assert load_audio(tmp_path / "a.flac", seconds=600.5).shape[1] == 600.5 * RATE

    @pytest.mark.parametrize("rate", [0, -1, 999, 768_001, 44100.0, True, "44100"])
    def test_bad_rates_are_refused(self, tmp_path: Path, rate: Any) -> None:
        with pytest.raises(InputError, match=r"sample_rate: expected an integer from 1000 to 768000, got "):
            load_audio(tmp_path / "none.wav", rate)

    def test_numbers_of_numpy(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(0.2, 44100), 44100)
        assert load_audio(tmp_path / "a.wav", np.int64(16000), seconds=np.float32(0.1)).shape == (2, 1600)
        assert load_audio(tmp_path / "a.wav", seconds=1e-9).shape == (2, 1)

    @pytest.mark.parametrize("path", [5, None, b"a.wav", ["a.wav"]])
    def test_what_is_no_name_is_refused(self, path: Any) -> None:
        with pytest.raises(InputError, match="audio: expected a file's name, got "):
            load_audio(path)


class TestDecoderProcess:
    """The decoder runs in a process of its own, and whatever becomes of that is an error like others."""

    @pytest.mark.parametrize(
        ("program", "message"),
        [
            (
                "import os, sys; print('heap corrupted', file=sys.stderr); os.abort()",
                "SIGABRT, and last said 'heap cor",
            ),
            ("import os; os.kill(os.getpid(), 11)", "the decoder ended with SIGSEGV"),
            ("raise SystemExit(3)", "the decoder ended with exit code 3"),
            ("print('half an answer', end='')", "the decoder ended with exit code 0"),
            ("import signal; signal.pause()", r"it took more than 0\.5 s"),
        ],
    )
    def test_what_ends_it_is_an_error(
        self, tmp_path: Path, program: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        monkeypatch.setattr(child_process, "PROGRAM", program)
        if "pause" in program:
            monkeypatch.setattr(sound_files, "_PATIENCE", 0.5)
        with pytest.raises(InputError, match=rf"a\.wav: cannot be decoded: .*{message}"):
            load_audio(tmp_path / "a.wav")

    def test_what_an_interpreter_prints_is_no_answer(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        monkeypatch.setattr(child_process, "PROGRAM", "print('welcome')\n" + child_process.PROGRAM)
        assert load_audio(tmp_path / "a.wav").shape[1] == RATE

    def test_it_is_this_package_from_any_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where the package was found by a relative entry of the path, as from a clone's folder."""
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        others = [entry for entry in sys.path if not (Path(entry) / "magihuman_fast").is_dir()]
        monkeypatch.setattr(sys, "path", ["", *others])
        monkeypatch.chdir(tmp_path)
        assert load_audio(tmp_path / "a.wav").shape[1] == RATE

    def test_whoever_waits_may_give_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        pid = tmp_path / "pid"
        program = f"import os, signal; open({str(pid)!r}, 'w').write(str(os.getpid())); signal.pause()"
        monkeypatch.setattr(child_process, "PROGRAM", program)

        def give_up() -> None:
            if pid.exists() and pid.read_text():
                raise Cancelled("enough")

        with pytest.raises(Cancelled, match="enough"):
            load_audio(tmp_path / "a.wav", while_waiting=give_up)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)

    def test_it_ends_with_its_parent(self, tmp_path: Path) -> None:
        """Killed, the parent cannot end it."""
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        pid = tmp_path / "pid"
        wait = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        patch = f"import magihuman_fast.codecs.sound_decoder as d\nd.read = lambda *job: exec({wait!r})\n"
        head, call = child_process.PROGRAM.rsplit("importlib", 1)
        program = f"""
from magihuman_fast.codecs import sound_files
from magihuman_fast.guards import child_process
child_process.PROGRAM = {head + patch + "importlib" + call!r}
sound_files.load_audio({str(tmp_path / "a.wav")!r})
"""
        with subprocess.Popen([sys.executable, "-c", program]) as parent:
            wait_until(lambda: pid.exists() and bool(pid.read_text()))
            parent.kill()
        wait_until(lambda: not Path(f"/proc/{pid.read_text()}").exists())

    def test_where_none_can_be_started(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        monkeypatch.setenv(child_process.CHILD, "1")
        with pytest.raises(InputError, match=r"a\.wav: no process to decode it can be started"):
            load_audio(tmp_path / "a.wav")

    def test_memory_is_limited(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A header may ask for any amount."""
        soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
        patched = "d._Reading.decode = lambda *_: iter([bytes(8 << 30)])"
        greedy = f"import magihuman_fast.codecs.sound_decoder as d\n{patched}\n"
        head, call = child_process.PROGRAM.rsplit("importlib", 1)
        monkeypatch.setattr(child_process, "PROGRAM", head + greedy + "importlib" + call)
        with pytest.raises(InputError, match=r"a\.wav: cannot be decoded: it asks for more than 4 GiB"):
            load_audio(tmp_path / "a.wav")


class TestTracks:
    def two_tracks(self, path: Path, default: int | None) -> None:
        with av.open(str(path), "w") as out:
            tracks = []
            for number in range(2):
                track = out.add_stream("pcm_s16le", rate=8000, layout="mono")
                track.disposition = av.stream.Disposition.default if number == default else 0
                tracks.append(track)
            for track, frequency in zip(tracks, (300.0, 700.0), strict=True):
                samples = (tone(1.0, 8000, frequency) * 32767).astype(np.int16)[None]
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.sample_rate = 8000
                out.mux(track.encode(frame))
                out.mux(track.encode(None))

    @pytest.mark.parametrize(
        ("default", "frequency", "said"),
        [(None, 300, "1 is read, the first"), (1, 700, "2 is read, the default one")],
    )
    def test_the_default_track_or_the_first(
        self,
        tmp_path: Path,
        default: int | None,
        frequency: float,
        said: str,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        self.two_tracks(tmp_path / "a.mka", default)
        assert hears(load_audio(tmp_path / "a.mka"), frequency)
        assert caplog.messages == [f"audio {tmp_path / 'a.mka'}: of 2 sound tracks number {said}"]

    def test_cover_chapters_and_odd_tags_are_no_sound(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        def id3(*frames: tuple[bytes, bytes]) -> bytes:
            body = b"".join(name + struct.pack(">I", len(data)) + b"\0\0" + data for name, data in frames)
            size = len(body)
            return b"ID3\3\0\0" + bytes((size >> shift) & 127 for shift in (21, 14, 7, 0)) + body

        sound = encoded(tmp_path / "a.mp3", "libmp3lame", 300, 44100, "mono")
        cover = b"\0image/png\0\3\0" + encoded_picture(Image.new("RGB", (64, 64)), "PNG")
        chapter = b"one\0" + struct.pack(">IIII", 0, 500, 0xFFFFFFFF, 0xFFFFFFFF)
        tags = id3((b"APIC", cover), (b"CHAP", chapter))
        (tmp_path / "b.mp3").write_bytes(tags + sound)
        with av.open(str(tmp_path / "b.mp3"), metadata_errors="replace") as container:
            assert [stream.type for stream in container.streams] == ["audio", "video"]
            assert len(container.chapters()) == 1
        assert torch.equal(load_audio(tmp_path / "b.mp3"), load_audio(tmp_path / "a.mp3"))
        plain = wav_bytes((tone(1.0, 8000) * 32767).astype(np.int16)[:, None], 8000)
        name = b"INFOINAM" + struct.pack("<I", 4) + b"caf\xe9"  # as older programs write it, no UTF-8
        (tmp_path / "a.wav").write_bytes(
            plain[:36] + b"LIST" + struct.pack("<I", len(name)) + name + plain[36:]
        )
        assert load_audio(tmp_path / "a.wav").shape[1] == RATE
        assert not caplog.messages

    def test_sound_of_a_video(self, tmp_path: Path) -> None:
        media.write_video(tmp_path / "a.mp4", clip(25), stereo(1.0, 700.0))
        out = load_audio(tmp_path / "a.mp4")
        assert abs(out.shape[1] - RATE) <= 1200  # AAC comes in blocks of 1024 samples at 44100 Hz
        assert abs(peak_frequency(out[0], RATE) - 700) < 2


class TestRefusals:
    def test_unreadable_is_refused_by_name(self, tmp_path: Path) -> None:
        media.write_video(tmp_path / "silent.mp4", clip(3), None)
        soundfile.write(tmp_path / "no_samples.wav", np.zeros(0, np.float32), 44100)
        soundfile.write(tmp_path / "nan.wav", np.full(9000, np.nan, np.float32), 44100, subtype="FLOAT")
        (tmp_path / "text.mp3").write_text("no sound")
        (tmp_path / "empty.wav").touch()
        (tmp_path / "folder.wav").mkdir()
        names = [
            "silent.mp4",
            "no_samples.wav",
            "nan.wav",
            "text.mp3",
            "empty.wav",
            "folder.wav",
            "missing.wav",
        ]
        for name in names:
            with pytest.raises(InputError, match=f"audio .*{name}"):
                load_audio(tmp_path / name)

    def test_playlists_open_nothing(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(0.2, 44100), 44100)
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"http://127.0.0.1:{server.getsockname()[1]}/a.wav"
            lists = {
                "near.m3u8": "#EXTM3U\n#EXTINF:1,\na.wav\n",
                "far.m3u8": f"#EXTM3U\n#EXTINF:1,\n{address}\n",
                "near.ffconcat": "ffconcat version 1.0\nfile a.wav\n",
                "far.ffconcat": f"ffconcat version 1.0\nfile {address}\n",
                "far.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
            }
            for name, content in lists.items():
                (tmp_path / name).write_text(content)
                with pytest.raises(InputError, match=f"audio .*{name}: expected one of "):
                    load_audio(tmp_path / name)
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.accept()

    def test_other_formats_are_refused_with_the_known_ones(self, tmp_path: Path) -> None:
        (tmp_path / "a.wav").write_text("no sound")
        with pytest.raises(InputError, match=r"a\.wav: expected one of AAC, .*WAV.*WMA"):
            load_audio(tmp_path / "a.wav")

    def test_seconds_stops_decoding(self, tmp_path: Path) -> None:
        soundfile.write(tmp_path / "a.wav", tone(2.0, 44100), 44100)
        whole = load_audio(tmp_path / "a.wav")
        part = load_audio(tmp_path / "a.wav", seconds=0.3)
        assert part.shape == (2, 15360)
        assert torch.equal(part, whole[:, :15360])
        assert torch.equal(load_audio(tmp_path / "a.wav", seconds=9.0), whole)
        assert load_audio(tmp_path / "a.wav", 16000, seconds=0.5).shape == (2, 8000)

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf"), "2", True])
    def test_bad_length_is_refused(self, tmp_path: Path, seconds: Any) -> None:
        soundfile.write(tmp_path / "a.wav", tone(0.2, 44100), 44100)
        with pytest.raises(InputError, match="seconds"):
            load_audio(tmp_path / "a.wav", seconds=seconds)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="magihuman_fast")
