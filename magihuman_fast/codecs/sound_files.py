"""Driving audio: the sound of audio and video files (MODEL.md section 6)."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..errors import InputError
from ..guards.child_process import CHILD, child_command, ending, tied
from ..guards.download_faults import page_or_pointer
from ..guards.file_paths import PathLike, require_input
from ..guards.number_checks import as_real, integer_between
from . import sound_decoder
from .sound_decoder import SAMPLE_RATES

log = logging.getLogger(__name__)

DRIVING_SAMPLE_RATE = 51200  # of driving audio as the encoder takes it: 25 latents of 2048 samples a second
_MAX_SECONDS = 600  # of a file that is read to its end
_PATIENCE = 120  # seconds that decoding may take
_POLL_SECONDS = 0.05


def load_audio(
    path: PathLike,
    sample_rate: int = DRIVING_SAMPLE_RATE,
    *,
    seconds: float | None = None,
    while_waiting: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Read the sound of an audio or video file as float32 `(2, n)` in [-1, 1], one channel given twice.

    Its channels are mixed as the published reference has ffmpeg mix them (`-ac 1`): by their places, front and centre
    before surround, without the low-frequency channel; channels without a known place count alike. Of several tracks
    the default one is read, else the first. Damaged packets are skipped. Both are told in one warning each.

    ffmpeg runs in a process of its own, which takes a tenth of a second: no file can end this one.

    Args:
        sample_rate: of the result, in Hz, 1000 to 768000.
        seconds: where decoding stops, so that what follows need not be sound; the result is shorter where the file is.
        while_waiting: called again and again until the sound is there; what it raises ends the decoding.

    Raises:
        InputError: no such file, not of a known format, no sound in it, none that can be decoded, or more than 600
            seconds where `seconds` is not given.
    """
    rate = integer_between("sample_rate", sample_rate, SAMPLE_RATES[0], SAMPLE_RATES[-1])
    length = _MAX_SECONDS if seconds is None else as_real(seconds)
    if length is None or not (math.isfinite(length) and length > 0):
        raise InputError(f"seconds: expected a positive number, got {seconds!r}")
    path = require_input(path, "audio")
    limit = max(1, round(length * rate))
    try:
        mono, notes = _decode(path, rate, limit + (seconds is None), while_waiting)
        if len(mono) > limit:
            raise InputError(f"expected at most {_MAX_SECONDS} s of sound, found more")
        if not torch.isfinite(mono).all():
            raise InputError("expected finite samples, found NaN or infinity")
    except InputError as error:
        found = page_or_pointer(path)
        reason = str(error) if found is None else f"expected sound, found {found}"
        raise InputError(f"audio {path}: {reason}") from error
    for note in notes:
        log.warning("audio %s: %s", path, note)
    return mono.clamp_(-1, 1).repeat(2, 1)


def _decode(
    path: Path, sample_rate: int, limit: int, while_waiting: Callable[[], object]
) -> tuple[torch.Tensor, list[str]]:
    """The first `limit` samples of one channel, and what is to be said about them."""
    mark = secrets.token_hex(16)
    job = {"file": str(path.absolute()), "sample_rate": sample_rate, "limit": limit}
    job |= {"mark": mark, "seconds": _PATIENCE}
    with tied() as stdin:
        try:
            child = subprocess.Popen(
                child_command(sound_decoder.__name__, job),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | {CHILD: "1"},
                start_new_session=True,  # an interrupted terminal is this process's to answer
            )
        except OSError as error:
            raise InputError(
                f"no process to decode it can be started ({error}): give its samples instead"
            ) from error
        with child:
            try:
                answer, said = _communicate(child, while_waiting)
            except BaseException:
                child.kill()
                raise
    _, begun, rest = answer.partition(mark.encode())
    head, end, sound = rest.partition(b"\n")
    if child.returncode or not begun or not end:
        last = said.decode("utf-8", "replace").strip().splitlines()[-1:]
        quoted = "".join(f", and last said {line[:300]!r}" for line in last)
        raise InputError(f"cannot be decoded: the decoder ended with {ending(child.returncode)}{quoted}")
    found = json.loads(head)
    if found["error"] is not None:
        raise InputError(found["error"])
    return torch.frombuffer(bytearray(sound), dtype=torch.float32), found["notes"]


def _communicate(child: subprocess.Popen[bytes], while_waiting: Callable[[], object]) -> tuple[bytes, bytes]:
    end = time.monotonic() + _PATIENCE
    while True:
        while_waiting()
        try:
            return child.communicate(timeout=_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                raise InputError(f"cannot be decoded: it took more than {_PATIENCE} s") from None
