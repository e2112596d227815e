"""Files out: mp4 (MODEL.md section 9) and previews."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..errors import InputError, OutputError
from ..guards.file_paths import PathLike, atomic_output, check_output_path
from ..guards.number_checks import as_integer, integer_between, value_text
from ..model.config import FPS, SAMPLE_RATE

logger = logging.getLogger(__name__)

_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_AAC_BIT_RATE = 192_000
_MAX_TILES = 10_000  # of a contact sheet
_MAX_RATE = 10_000_000  # Hz, of a plot
_X264_THREADS = 8  # fixed: the encoded bytes depend on the number of threads

Samples = np.ndarray[Any, Any] | torch.Tensor


def write_video(
    path: PathLike,
    frames: Samples | Iterable[Samples],
    audio: Samples | None,
    *,
    fps: int = FPS,
    sample_rate: int = SAMPLE_RATE,
    crf: int = 18,
) -> None:
    """Write an mp4 of H.264 (yuv420p, BT.709) and AAC; picture and sound end with the shorter of the two.

    Args:
        frames: uint8 `(F, H, W, 3)` RGB with even H and W, or an iterable of such chunks.
        audio: float32 `(n, 2)` in [-1, 1], or None for a silent file without a sound track.
        crf: x264's quality, 1 (best) to 51.

    Equal input gives equal bytes. The file appears under its name only when it is complete.

    Raises:
        InputError: frames, audio or options of the wrong kind, or less than one frame of either.
        OutputError: the file cannot be written; nothing is left of it.
    """
    import av

    path = check_output_path(path)
    crf, fps = integer_between("crf", crf, 1, 51), integer_between("fps", fps, 1, 240)
    sound = None
    if audio is not None:
        rate = as_integer(sample_rate)
        if rate not in _AAC_RATES:
            raise InputError(f"sample_rate: expected one of {_AAC_RATES}, got {value_text(sample_rate)}")
        sample_rate = rate
        sound = _stereo(audio)
        if len(sound) * fps < sample_rate:
            raise InputError(f"audio: expected at least one frame's length, got {len(sound)} samples")
    chunks: Iterable[Samples] = [frames] if isinstance(frames, np.ndarray | torch.Tensor) else frames
    with atomic_output(path) as temporary:
        try:
            with av.open(
                str(temporary.absolute()), "w", format="mp4", options={"movflags": "faststart"}
            ) as out:
                _encode(out, chunks, sound, fps, sample_rate, crf)
        except av.FFmpegError as error:
            raise OutputError(f"{path}: cannot be written: {error}") from error


def _encode(
    out: Any,
    chunks: Iterable[Samples],
    sound: np.ndarray[Any, Any] | None,
    fps: int,
    sample_rate: int,
    crf: int,
) -> None:
    import av

    to_yuv = av.video.reformatter.VideoReformatter()
    video = sound_track = None
    size: tuple[int, ...] = ()
    count = heard = 0
    for frame in _single_frames(chunks):
        end = (count + 1) * sample_rate // fps
        if sound is not None and end > len(sound):
            break
        if video is None:
            size = frame.shape
            video = _video_stream(out, size[1], size[0], fps, crf)
            if sound is not None:
                sound_track = out.add_stream("aac", rate=sample_rate, layout="stereo", bit_rate=_AAC_BIT_RATE)
        if frame.shape != size:
            raise InputError(f"frames: expected all of {size}, got one of {frame.shape}")
        rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = to_yuv.reformat(rgb, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.pts, picture.time_base = count, Fraction(1, fps)
        out.mux(video.encode(picture))
        if sound is not None and sound_track is not None:
            samples = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound[heard:end].T), format="fltp", layout="stereo"
            )
            samples.sample_rate, samples.pts, samples.time_base = sample_rate, heard, Fraction(1, sample_rate)
            out.mux(sound_track.encode(samples))
        count, heard = count + 1, end
    if video is None:
        raise InputError("frames: expected at least one, got none")
    out.mux(video.encode(None))
    if sound_track is not None:
        out.mux(sound_track.encode(None))


def _video_stream(out: Any, width: int, height: int, fps: int, crf: int) -> Any:
    import av

    if "libx264" in av.codecs_available:
        # Macroblock-tree rate control gives other bytes from one run to the next, seen with frames 64 wide.
        options = {"crf": str(crf), "x264-params": "mbtree=0"}
        stream = out.add_stream("libx264", rate=fps, options=options)
        stream.codec_context.thread_count = _X264_THREADS
    else:
        logger.warning("PyAV has no libx264: writing MPEG-4 part 2, which fewer players show")
        stream = out.add_stream("mpeg4", rate=fps, bit_rate=width * height * fps // 4)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
    context.color_range = 1  # limited
    return stream


def write_contact_sheet(path: PathLike, frames: Samples, *, columns: int = 4, count: int = 8) -> None:
    """Write a PNG of `count` frames spread evenly over uint8 `(F, H, W, 3)`, each at most 480 wide.

    Raises:
        InputError: frames or counts of the wrong kind.
        OutputError: the file cannot be written.
    """
    from PIL import Image

    path = check_output_path(path, ".png")
    columns, count = (
        integer_between(name, value, 1, _MAX_TILES)
        for name, value in (("columns", columns), ("count", count))
    )
    chunk = _checked_chunk(frames)
    if not len(chunk):
        raise InputError("frames: expected at least one, got none")
    picks = np.unique(np.linspace(0, len(chunk) - 1, count).round().astype(int))
    width = min(chunk.shape[2], 480)
    height = max(1, round(chunk.shape[1] * width / chunk.shape[2]))
    columns = min(columns, len(picks))
    sheet = Image.new("RGB", (columns * width, -(-len(picks) // columns) * height))
    for place, pick in enumerate(picks):
        tile = Image.fromarray(chunk[pick]).resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (place % columns * width, place // columns * height))
    with atomic_output(path) as temporary:
        sheet.save(temporary, format="PNG")


def write_waveform_plot(path: PathLike, audio: Samples, sample_rate: int = SAMPLE_RATE) -> None:
    """Write a PNG of the waveform of float32 `(n, 2)`: per channel the range of values over time in seconds.

    Raises:
        InputError: audio of the wrong kind.
        OutputError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = check_output_path(path, ".png")
    sample_rate = integer_between("sample_rate", sample_rate, 1, _MAX_RATE)
    sound = _stereo(audio)
    if not len(sound):
        raise InputError("audio: expected at least one sample, got none")
    starts = np.unique(np.linspace(0, len(sound), 2000, endpoint=False).astype(int))
    low, high = np.minimum.reduceat(sound, starts), np.maximum.reduceat(sound, starts)
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, sharex=True)
    for channel, (ax, name) in enumerate(zip(axes, ("left", "right"), strict=True)):
        ax.fill_between(starts / sample_rate, low[:, channel], high[:, channel], linewidth=0.5)
        ax.set(ylabel=name, ylim=(-1.05, 1.05), xlim=(0, len(sound) / sample_rate))
    axes[-1].set_xlabel("seconds")
    with atomic_output(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _checked_chunk(chunk: Samples) -> np.ndarray[Any, Any]:
    array = np.asarray(chunk.cpu() if isinstance(chunk, torch.Tensor) else chunk)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or 0 in array.shape[1:]:
        raise InputError(f"frames: expected uint8 of shape (F, H, W, 3), got {array.dtype} {array.shape}")
    return array


def _single_frames(chunks: Iterable[Samples]) -> Iterator[np.ndarray[Any, Any]]:
    for chunk in chunks:
        array = _checked_chunk(chunk)
        if array.shape[1] % 2 or array.shape[2] % 2:
            raise InputError(f"frames: expected even height and width, got {array.shape[1]}x{array.shape[2]}")
        yield from (np.ascontiguousarray(frame) for frame in array)


def _stereo(audio: Samples) -> np.ndarray[Any, Any]:
    array = np.asarray(audio.cpu() if isinstance(audio, torch.Tensor) else audio)
    if not np.issubdtype(array.dtype, np.floating) or array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"audio: expected floating point of shape (n, 2), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("audio: expected finite samples, found NaN or infinity")
    return np.clip(array.astype(np.float32), -1.0, 1.0)
