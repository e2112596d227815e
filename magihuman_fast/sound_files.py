"""Driving audio: the sound of audio and video files (MODEL.md section 6)."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
from pathlib import Path

import torch

from .child_process import CHILD, child_command, ending
from .download_faults import page_or_pointer
from .errors import InputError
from .file_paths import PathLike, require_input

log = logging.getLogger(__name__)

DRIVING_SAMPLE_RATE = 51200  # of driving audio as the encoder takes it: 25 latents of 2048 samples a second
_MAX_SECONDS = 600  # of a file that is read to its end
_PATIENCE = 120  # seconds that decoding may take


def load_audio(
    path: PathLike,
    sample_rate: int = DRIVING_SAMPLE_RATE,
    *,
    seconds: float | None = None,
) -> torch.Tensor:
    """Read the sound of an audio or video file as float32 `(2, n)` in [-1, 1], one channel given twice.

    Its channels are mixed as the published reference has ffmpeg mix them (`-ac 1`): by their places, front and centre
    before surround, without the low-frequency channel; channels without a known place count alike. Of several tracks
    the default one is read, else the first. Damaged packets are skipped. Both are told in one warning each.

    ffmpeg runs in a process of its own, which takes a tenth of a second: no file can end this one.

    Args:
        sample_rate: of the result, in Hz.
        seconds: where decoding stops, so that what follows need not be sound; the result is shorter where the file is.

    Raises:
        InputError: no such file, not of a known format, no sound in it, none that can be decoded, or more than 600
            seconds where `seconds` is not given.
    """
    path = require_input(path, "audio")
    if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"seconds: expected a positive number, got {seconds}")
    limit = round((_MAX_SECONDS if seconds is None else seconds) * sample_rate)
    try:
        mono, notes = _decode(path, sample_rate, limit + (seconds is None))
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


def _decode(path: Path, sample_rate: int, limit: int) -> tuple[torch.Tensor, list[str]]:
    """The first `limit` samples of one channel, and what is to be said about them."""
    job = {"file": str(path.absolute()), "sample_rate": sample_rate, "limit": limit}
    try:
        child = subprocess.run(
            child_command("sound_decoder", job),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=os.environ | {CHILD: "1"},
            timeout=_PATIENCE,
            start_new_session=True,  # an interrupted terminal is this process's to answer
        )
    except OSError as error:
        raise InputError(
            f"no process to decode it can be started ({error}): give its samples instead"
        ) from error
    except subprocess.TimeoutExpired:
        raise InputError(f"cannot be decoded: it took more than {_PATIENCE} s") from None
    head, end, sound = child.stdout.partition(b"\n")
    if child.returncode or not end:
        last = child.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        said = "".join(f", and last said {line[:300]!r}" for line in last)
        raise InputError(f"cannot be decoded: the decoder ended with {ending(child.returncode)}{said}")
    answer = json.loads(head)
    if answer["error"] is not None:
        raise InputError(answer["error"])
    return torch.frombuffer(bytearray(sound), dtype=torch.float32), answer["notes"]
