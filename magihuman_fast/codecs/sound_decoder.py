"""Decodes the sound of one file to one channel, in a process of its own (`sound_files` is the caller's side).

Because ffmpeg reads what strangers wrote, and because PyAV cannot hold every frame: one whose channels are in an order
of their own, as in many CAF and MOV files, has the memory of that order freed twice. The process ends without freeing
anything.
"""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..guards.child_process import end_with_parent

if TYPE_CHECKING:
    import av.container

# A closed list, because other readers do more than read: playlists open other addresses.
FORMATS = {
    "AAC": "aac,loas",
    "AC-3": "ac3,eac3",
    "AIFF": "aiff",
    "AMR": "amr",
    "APE": "ape",
    "AU": "au",
    "AVI": "avi",
    "CAF": "caf",
    "DTS": "dts",
    "FLAC": "flac",
    "FLV": "flv",
    "Matroska and WebM": "matroska",
    "MP3": "mp3",
    "MP4, MOV and 3GP": "mov",
    "MPEG": "mpeg,mpegts",
    "Ogg, Opus and Speex": "ogg",
    "TrueHD": "mlp,truehd",
    "TTA": "tta",
    "WAV": "wav,w64",
    "WavPack": "wv",
    "WMA": "asf",
}
SAMPLE_RATES = range(1000, 768_001)  # Hz; beyond them one second of sound could become gigabytes
_MAX_CHANNELS = 64  # that libswresample mixes
_MAX_MEMORY = 4 << 30  # bytes of addresses: a header may ask for any amount


def serve(job: dict[str, Any]) -> None:
    """Read `file`, up to `limit` samples of `sample_rate`; to stdout go `mark`, a line of JSON and the float32 samples.

    The line has `error`, or None, and `notes`: what a user should know of how the file was read.
    """
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], resource.RLIM_INFINITY))
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MAX_MEMORY if most == resource.RLIM_INFINITY else min(_MAX_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = os.dup(1)
    os.dup2(2, 1)  # libraries that print must not spoil the answer
    error, sound, notes = None, b"", list[str]()
    try:
        sound, notes = read(job["file"], job["sample_rate"], job["limit"])
    except InputError as failure:
        error = str(failure)
    with open(answer, "wb") as out:
        out.write(job["mark"].encode())  # an interpreter may have printed before this function was called
        out.write(json.dumps({"error": error, "notes": notes}).encode() + b"\n")
        out.write(sound)
    os._exit(0)


def read(file: str, sample_rate: int, limit: int) -> tuple[bytes, list[str]]:
    """Up to `limit` float32 samples of one channel, and the notes on them.

    What it has decoded must not be freed, see above: it is for processes that end by `os._exit`.

    Raises:
        InputError: whatever is wrong with the file.
    """
    import av

    reading, sound = _Reading(), bytearray()
    try:
        for piece in reading.decode(file, sample_rate):
            sound += piece
            if len(sound) >= 4 * limit:
                break
    except MemoryError as error:
        raise InputError(
            f"cannot be decoded: it asks for more than {_MAX_MEMORY >> 30} GiB of memory"
        ) from error
    except InputError:
        raise
    except (av.FFmpegError, ValueError, OSError) as error:
        raise InputError(f"cannot be decoded: {_reason(error)}") from error
    reading.tell_damage(len(sound) / 4 / sample_rate)
    return bytes(sound[: 4 * limit]), reading.notes


class _Reading:
    """One file's decoding: the sound, and `notes` on what was chosen and what was left out."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._packets = 0
        self._skipped: Counter[str] = Counter()
        self._end: Exception | None = None  # why the rest of the file cannot be read

    def decode(self, file: str, sample_rate: int) -> Iterator[bytes]:
        """The sound as float32 pieces of one channel; whatever it changes to on the way, and without what is damaged.

        Raises:
            InputError: not of a known format, without sound, or sound that can't be mixed.
            FFmpegError, ValueError, OSError, MemoryError: it cannot be read.
        """
        import av

        options = {"format_whitelist": ",".join(FORMATS.values()), "protocol_whitelist": "file"}
        try:
            container = av.open(file, options=options, metadata_errors="replace")
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"expected one of {', '.join(FORMATS)}: {_reason(error)}") from error
        with container:
            track = self._choose(container)
            mixer = _Mixer(sample_rate)
            packets = container.demux(track)
            while True:
                try:
                    packet = next(packets, None)
                except av.FFmpegError as error:
                    self._end = error
                    break
                except IndexError:  # of a track that begins later, which PyAV does not know
                    packets = container.demux(track)
                    continue
                if packet is None:
                    break
                self._packets += packet.size > 0  # the last is none: it asks for what the decoder still holds
                try:
                    for frame in track.decode(packet):
                        yield from mixer.add(frame)
                except av.EOFError:  # it was asked for what it still holds already
                    pass
                except av.FFmpegError as error:
                    self._skipped[_reason(error)] += 1
            yield from mixer.finish()

    def _choose(self, container: av.container.InputContainer) -> Any:
        from av.stream import Disposition

        tracks = [track for track in container.streams.audio if track.codec_context is not None]
        if not tracks:
            others = "one of an unknown codec" if container.streams.audio else "none"
            raise InputError(f"expected a sound track, found {others}")
        marked = [track for track in tracks if track.disposition & Disposition.default]
        chosen = (marked or tracks)[0]
        if len(tracks) > 1:
            which = "the default one" if marked else "the first"
            self.notes.append(
                f"of {len(tracks)} sound tracks number {1 + tracks.index(chosen)} is read, {which}"
            )
        return chosen

    def tell_damage(self, seconds: float) -> None:
        """Note how much was damaged, of a file of which `seconds` could be used.

        Raises:
            InputError: all of it.
        """
        told = []
        if count := self._skipped.total():
            what = "skipped" if seconds else "cannot be decoded"
            reasons = ", ".join(self._skipped)
            packets = max(count, self._packets)
            told.append(f"{what}: {count} of {packets} packets, which are damaged ({reasons})")
        if self._end is not None:
            where = f" after {seconds:.2f} s of sound" if seconds else ""
            told.append(f"cannot be read further{where}: {_reason(self._end)}")
        if not seconds:
            raise InputError("; ".join(told) or "expected sound, found an empty track")
        if told:
            self.notes.append("; ".join(told))


def _reason(error: Exception) -> str:
    """An error's message, of ffmpeg's without its number and the name of the function that failed."""
    return str(getattr(error, "strerror", None) or error)


_KEPT: list[object] = []  # layouts, which must not be freed


class _Mixer:
    """Mixes decoded frames to one channel of `sample_rate`.

    All of it happens in ffmpeg's own filters: PyAV's planes of a frame with more than eight channels lead out of it.
    """

    def __init__(self, sample_rate: int) -> None:
        self._sample_rate = sample_rate
        self._kind: tuple[object, ...] = ()
        self._graph: Any = None

    def add(self, frame: av.AudioFrame) -> Iterator[bytes]:
        layout = frame.layout
        _KEPT.append(layout)
        kind = (frame.sample_rate, frame.format.name, layout.name)
        if kind != self._kind:
            graph = _mixing_graph(*kind, layout.nb_channels, self._sample_rate)
            yield from self.finish()
            self._graph, self._kind = graph, kind
        frame.pts = None  # samples follow each other, as in the published decoding: gaps are not filled
        self._graph.push(frame)
        yield from self._mixed()

    def finish(self) -> Iterator[bytes]:
        if self._graph is not None:
            self._graph.push(None)
            yield from self._mixed()
        self._graph, self._kind = None, ()

    def _mixed(self) -> Iterator[bytes]:
        import av

        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            yield bytes(memoryview(frame.planes[0])[: 4 * frame.samples])


def _mixing_graph(rate: int, form: str, layout: str, channels: int, sample_rate: int) -> av.filter.Graph:
    """ffmpeg's filters from frames of this kind to packed float32 of one channel."""
    import av

    if rate not in SAMPLE_RATES:
        low, high = SAMPLE_RATES[0], SAMPLE_RATES[-1]
        raise InputError(f"expected a sample rate of {low} to {high} Hz, got {rate}")
    if not 1 <= channels <= _MAX_CHANNELS:
        raise InputError(f"expected 1 to {_MAX_CHANNELS} channels, got {channels}")

    def graph(*mix: tuple[str, ...]) -> av.filter.Graph:
        made = av.filter.Graph()
        source = made.add_abuffer(sample_rate=rate, format=form, layout=layout, time_base=Fraction(1, rate))
        # Without a limit the mix to floats would not be scaled to stay in range, as that to integers is.
        resample = f"{sample_rate}:rematrix_maxval=1:out_sample_fmt=flt:out_chlayout=mono"
        packed = ("aformat", "sample_fmts=flt:channel_layouts=mono")
        filters = [made.add(*each) for each in (*mix, ("aresample", resample), packed, ("abuffersink",))]
        made.link_nodes(source, *filters).configure()
        return made

    if channels > 1:  # one alone is no mix, whatever place it claims
        with suppress(av.FFmpegError):  # libswresample knows no mix of these places
            return graph()
    return graph(("pan", "mono|c0=" + "+".join(f"{1 / channels:.9f}*c{i}" for i in range(channels))))
