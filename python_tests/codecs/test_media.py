"""Files in and out: unreadable inputs, the mp4's pictures and sound, and nothing left behind by a failed write."""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from magihuman_fast.codecs import media
from magihuman_fast.errors import Cancelled, InputError, OutputError
from media_cases import RATE, clip, peak_frequency, stereo
from numerics import rel_err


class TestVideo:
    def test_round_trip(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        frames = clip(30)
        media.write_video(path, frames, stereo(1.2))
        with av.open(str(path)) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, video.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert (video.average_rate, video.frames) == (Fraction(25), 30)
            assert (sound.codec_context.name, sound.rate, sound.channels) == ("aac", RATE, 2)
            assert sound.duration * sound.time_base == pytest.approx(1.2, abs=1e-3)
            decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
        assert np.abs(np.stack(decoded).astype(int) - frames).max() <= 3
        with av.open(str(path)) as container:
            samples = torch.from_numpy(
                np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
            )
        assert samples.shape[0] == 2
        assert abs(peak_frequency(samples[0], RATE) - 440) < 1
        assert rel_err(samples[1, 2000:50000], torch.from_numpy(stereo(1.2))[2000:50000, 1]) < 0.05
        data = path.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")

    def test_every_rate(self, tmp_path: Path) -> None:
        path, sound = tmp_path / "a.mp4", np.zeros((16000, 2), np.float32)
        for rate in (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000):
            media.write_video(path, clip(1), sound, sample_rate=rate, crf=51)
            with av.open(str(path)) as container:
                assert container.streams.audio[0].rate == rate
        for fps in (1, 240):
            media.write_video(path, clip(2), None, fps=fps, crf=1)
            with av.open(str(path)) as container:
                assert container.streams.video[0].average_rate == fps

    def test_colours_are_tagged_as_they_are_converted(self, tmp_path: Path) -> None:
        red = np.zeros((2, 64, 64, 3), np.uint8)
        red[..., 0] = 255
        media.write_video(tmp_path / "a.mp4", red, None)
        with av.open(str(tmp_path / "a.mp4")) as container:
            frame = next(container.decode(video=0))
        bt709, limited = 1, 1
        assert (int(frame.colorspace), int(frame.color_range)) == (bt709, limited)
        luma = frame.to_ndarray()[:64]
        assert abs(float(luma.mean()) - (16 + 219 * 0.2126)) < 1

    def test_equal_input_gives_equal_bytes_in_any_chunks(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(1).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
        sound = stereo(0.8)
        media.write_video(tmp_path / "a.mp4", frames, sound)
        media.write_video(tmp_path / "b.mp4", torch.from_numpy(frames), torch.from_numpy(sound))
        media.write_video(tmp_path / "c.mp4", iter([frames[:7], frames[7:7], frames[7:]]), sound)
        contents = {(tmp_path / f"{name}.mp4").read_bytes() for name in "abc"}
        assert len(contents) == 1

    @pytest.mark.parametrize(("frames", "seconds", "kept"), [(30, 0.8, 20), (20, 1.5, 20), (25, 0.999, 24)])
    def test_the_shorter_decides(self, tmp_path: Path, frames: int, seconds: float, kept: int) -> None:
        media.write_video(tmp_path / "a.mp4", clip(frames), stereo(seconds))
        with av.open(str(tmp_path / "a.mp4")) as container:
            video, sound = container.streams.video[0], container.streams.audio[0]
            assert video.frames == kept
            assert sound.duration * sound.time_base == pytest.approx(kept / 25, abs=1e-3)

    def test_better_quality_is_larger(self, tmp_path: Path) -> None:
        frames = np.random.default_rng(1).integers(0, 255, (5, 64, 64, 3), dtype=np.uint8)
        for crf in (10, 40):
            media.write_video(tmp_path / f"{crf}.mp4", frames, None, crf=crf)
        assert (tmp_path / "10.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size

    def test_without_x264_another_codec_is_used_and_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
        with caplog.at_level(logging.WARNING, logger="magihuman_fast"):
            media.write_video(tmp_path / "a.mp4", clip(5), stereo(0.2))
        assert "libx264" in caplog.text
        with av.open(str(tmp_path / "a.mp4")) as container:
            assert container.streams.video[0].codec_context.name == "mpeg4"
            assert len(list(container.decode(video=0))) == 5

    @pytest.mark.parametrize(
        ("frames", "audio", "options", "message"),
        [
            (clip(0), None, {}, "at least one"),
            (iter([]), None, {}, "at least one"),
            (clip(2).astype(np.float32), None, {}, r"uint8.*float32 \(2, 64, 96, 3\)"),
            (clip(2)[0], None, {}, r"\(F, H, W, 3\), got uint8 \(64, 96, 3\)"),
            (clip(2)[..., :2], None, {}, r"\(2, 64, 96, 2\)"),
            (clip(2, height=63), None, {}, "even height and width, got 63x96"),
            (clip(2, width=95), None, {}, "even height and width, got 64x95"),
            ([clip(2), clip(2, height=32)], None, {}, r"all of \(64, 96, 3\), got one of \(32, 96, 3\)"),
            (clip(2), stereo(1.0).T, {}, r"\(n, 2\), got float32 \(2, 44100\)"),
            (clip(2), (stereo(1.0) * 1000).astype(np.int16), {}, "int16"),
            (clip(2), np.full((44100, 2), np.nan, np.float32), {}, "NaN"),
            (clip(2), stereo(0.01), {}, "one frame's length, got 441 samples"),
            (clip(2), stereo(1.0), {"sample_rate": 44101}, "sample_rate.*44101"),
            (clip(2), stereo(1.0), {"sample_rate": 7350}, "sample_rate.*7350"),
            (clip(2), None, {"crf": 0}, "crf: expected an integer from 1 to 51, got 0"),
            (clip(2), None, {"crf": 52}, "crf: expected an integer from 1 to 51, got 52"),
            (clip(2), None, {"fps": 0}, "fps: expected an integer from 1 to 240, got 0"),
            (clip(2), None, {"fps": 241}, "fps: expected an integer from 1 to 240, got 241"),
        ],
    )
    def test_bad_input_is_refused(
        self, tmp_path: Path, frames: Any, audio: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            media.write_video(tmp_path / "a.mp4", frames, audio, **options)
        assert list(tmp_path.iterdir()) == []


def interrupted(error: BaseException) -> Iterator[np.ndarray]:
    yield clip(10)
    raise error


class TestFailedWrites:
    """Whatever goes wrong, an existing file keeps its content and nothing new is left in the folder."""

    @pytest.mark.parametrize(
        "error", [KeyboardInterrupt(), Cancelled("stop"), RuntimeError("decoder failed")]
    )
    def test_interrupted_frames(self, tmp_path: Path, error: BaseException) -> None:
        (tmp_path / "a.mp4").write_bytes(b"earlier")
        with pytest.raises(type(error)):
            media.write_video(tmp_path / "a.mp4", interrupted(error), stereo(2.0))
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        assert (tmp_path / "a.mp4").read_bytes() == b"earlier"

    @pytest.mark.parametrize("limit", [0, 3000])
    def test_no_room(self, tmp_path: Path, limit: int) -> None:
        """The system refuses to let the file grow, at the start or while the last bytes are written."""
        frames = np.random.default_rng(1).integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OutputError, match=r"a\.mp4: cannot be written"):
                media.write_video(tmp_path / "a.mp4", frames, stereo(0.8))
            with pytest.raises(OutputError, match=r"a\.png: cannot be written"):
                media.write_contact_sheet(tmp_path / "a.png", frames)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert list(tmp_path.iterdir()) == []

    def test_failed_renaming(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OutputError, match=r"a\.mp4: cannot be written.*Input/output"):
            media.write_video(tmp_path / "a.mp4", clip(3), None)
        assert list(tmp_path.iterdir()) == []

    def test_atomic_output_replaces_only_when_complete(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_text("old")
        with media.atomic_output(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "new")]

    def test_permissions_are_the_usual_ones(self, tmp_path: Path) -> None:
        (tmp_path / "plain").touch()
        media.write_video(tmp_path / "a.mp4", clip(2), None)
        assert (tmp_path / "a.mp4").stat().st_mode == (tmp_path / "plain").stat().st_mode


WRITERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: media.write_video(path, clip(2), None), ".mp4"),
    (lambda path: media.write_contact_sheet(path, clip(2)), ".png"),
    (lambda path: media.write_waveform_plot(path, stereo(0.1)), ".png"),
    (media.check_output_path, ".mp4"),
]


class TestOutputPath:
    @pytest.mark.parametrize(("write", "suffix"), WRITERS)
    def test_impossible_names_are_refused(
        self, tmp_path: Path, write: Callable[[Path], object], suffix: str
    ) -> None:
        (tmp_path / "file").touch()
        (tmp_path / f"folder{suffix}").mkdir()
        for name, message in (
            (f"missing/a{suffix}", "expected an existing folder"),
            (f"file/a{suffix}", "expected an existing folder"),
            (f"folder{suffix}", "expected a file name"),
            ("a.avi", f"ends in {suffix}, got 'a.avi'"),
            ("a", f"ends in {suffix}, got 'a'"),
            ("x" * 300 + suffix, "cannot be written"),
        ):
            with pytest.raises(OutputError, match=message):
                write(tmp_path / name)
        assert {p.name for p in tmp_path.rglob("*")} == {"file", f"folder{suffix}"}

    def test_folder_without_write_permission_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.access", lambda path, mode: False)  # what the system says to others than root
        with pytest.raises(OutputError, match="writable folder"):
            media.check_output_path(tmp_path / "a.mp4")

    def test_good_path_is_returned_and_nothing_created(self, tmp_path: Path) -> None:
        assert media.check_output_path(str(tmp_path / "a.MP4")) == tmp_path / "a.MP4"
        (tmp_path / "b.mp4").touch()
        assert media.check_output_path(tmp_path / "b.mp4") == tmp_path / "b.mp4"
        assert [p.name for p in tmp_path.iterdir()] == ["b.mp4"]


class TestPreviews:
    def test_contact_sheet_shows_first_to_last(self, tmp_path: Path) -> None:
        frames = clip(30)
        media.write_contact_sheet(tmp_path / "a.png", frames, columns=4, count=8)
        sheet = np.asarray(Image.open(tmp_path / "a.png"))
        assert sheet.shape == (2 * 64, 4 * 96, 3)
        tiles = sheet.reshape(2, 64, 4, 96, 3).swapaxes(1, 2).reshape(8, 64, 96, 3)
        assert np.array_equal(tiles[0], frames[0])
        assert np.array_equal(tiles[7], frames[29])
        assert all(np.diff(tiles[:, 0, 0, 0].astype(int)) > 0)

    def test_contact_sheet_of_few_or_large_frames(self, tmp_path: Path) -> None:
        media.write_contact_sheet(tmp_path / "few.png", torch.from_numpy(clip(2)))
        assert Image.open(tmp_path / "few.png").size == (2 * 96, 64)
        media.write_contact_sheet(tmp_path / "large.png", clip(3, 270, 960), columns=2)
        assert Image.open(tmp_path / "large.png").size == (2 * 480, 2 * 135)
        for frames, options in ((clip(0), {}), (clip(2), {"columns": 0}), (clip(2), {"count": 0})):
            with pytest.raises(InputError):
                media.write_contact_sheet(tmp_path / "bad.png", frames, **options)

    def test_waveform_plot_shows_the_louder_part(self, tmp_path: Path) -> None:
        sound = stereo(2.0)
        sound[:RATE] *= 0.02
        media.write_waveform_plot(tmp_path / "a.png", sound)
        image = np.asarray(Image.open(tmp_path / "a.png").convert("L")).astype(int)
        ink = (image < 200)[:, 100:-20].sum(axis=0)
        assert ink[len(ink) * 3 // 5 :].mean() > 3 * ink[: len(ink) * 2 // 5].mean()
        media.write_waveform_plot(tmp_path / "b.png", torch.from_numpy(sound))
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        with pytest.raises(InputError, match="at least one sample"):
            media.write_waveform_plot(tmp_path / "c.png", sound[:0])

    def test_plotting_leaves_the_callers_backend_alone(self, tmp_path: Path) -> None:
        import matplotlib

        before = matplotlib.rcParams._get("backend")
        media.write_waveform_plot(tmp_path / "a.png", stereo(0.1))
        assert matplotlib.rcParams._get("backend") == before
