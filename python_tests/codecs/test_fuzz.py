"""Damaged sounds and pictures end in a result or an `InputError`, never in anything else: some thousand of each."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuzz_files import case
from magihuman_fast.codecs.sound_files import load_audio
from magihuman_fast.errors import InputError
from media_cases import decode_together, layout_places, tone, write_sound
from picture_cases import P3, rgb_profile

FUZZER = Path(__file__).resolve().parents[1] / "fuzz_files.py"
CASES = 5000
SOUNDS: tuple[tuple[str, str, str, int], ...] = (
    ("a.wav", "pcm_s16le", "5.1", 8000),
    ("a.w64", "pcm_s24le", "stereo", 8000),
    ("a.aiff", "pcm_s16be", "stereo", 8000),
    ("a.au", "pcm_f32be", "stereo", 8000),
    ("a.caf", "pcm_s24be", "7.1", 8000),
    ("a.flac", "flac", "stereo", 48000),
    ("a.mp3", "libmp3lame", "stereo", 44100),
    ("a.aac", "aac", "stereo", 44100),
    ("aac.m4a", "aac", "5.1", 48000),
    ("alac.m4a", "alac", "5.1", 8000),
    ("a.opus", "libopus", "stereo", 48000),
    ("a.mka", "flac", "5.1", 8000),
    ("a.webm", "libopus", "stereo", 48000),
    ("a.avi", "pcm_s16le", "stereo", 8000),
    ("a.ts", "aac", "stereo", 44100),
    ("a.mpg", "mp2", "stereo", 48000),
    ("a.flv", "aac", "stereo", 44100),
    ("a.wma", "wmav2", "stereo", 44100),
    ("a.ac3", "ac3", "5.1(side)", 48000),
    ("a.eac3", "eac3", "5.1", 48000),
    ("a.tta", "tta", "stereo", 44100),
    ("a.wv", "wavpack", "5.1", 8000),
    ("a.mov", "pcm_s16be", "7.1", 8000),
    ("a.3gp", "aac", "mono", 16000),
)


def fuzz(kind: str, folder: Path, first: int, seed: int) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(FUZZER),
        kind,
        str(folder),
        str(CASES),
        "--seed",
        str(seed),
        "--first",
        str(first),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200)


def test_damaged_sounds(tmp_path: Path) -> None:
    """One that ends its decoder's process, as no case is known to, must still be an error to whoever loads it."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    for name, codec, layout, rate in SOUNDS:
        samples = np.repeat(tone(0.2, rate)[:, None], len(layout_places(layout)), axis=1)
        write_sound(folder / name, samples, rate, codec, layout=layout, **adts(name))
    assert all(map(len, decode_together(sorted(folder.iterdir()))))
    for decoded in folder.glob("*.f32"):
        decoded.unlink()
    first, crashes = 0, []
    while (done := fuzz("sound", folder, first, seed=1)).returncode:
        assert done.returncode < 0, done.stderr  # an exception, or a case that takes for ever
        number = int(folder.with_suffix(".case").read_text())
        file, data = case(sorted(folder.iterdir()), 1, number)
        (tmp_path / f"{number}{file.suffix}").write_bytes(data)
        with pytest.raises(InputError, match="cannot be decoded"):
            load_audio(tmp_path / f"{number}{file.suffix}", seconds=2)
        first = number + 1
        crashes.append((number, done.stderr.splitlines()[:1]))
    assert len(crashes) < 10, crashes


def adts(name: str) -> dict[str, str]:
    return {"format": "adts"} if name.endswith(".aac") else {}


def pictures() -> dict[str, bytes]:
    """Small pictures of every format and of many forms."""
    colours = np.linspace(0, 255, 24 * 32 * 4).astype(np.uint8).reshape(24, 32, 4)
    picture = Image.fromarray(colours)
    rgb = picture.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8825)[1] = "N"
    profile = rgb_profile(P3)
    forms: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "rgba.png": (picture, {"icc_profile": profile, "exif": exif}),
        "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "deep.png": (Image.fromarray(np.linspace(0, 65535, 768).astype(np.uint16).reshape(24, 32)), {}),
        "rgb.jpg": (rgb, {"exif": exif, "icc_profile": profile, "comment": b"hello"}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "mpo.jpg": (rgb, {"format": "MPO", "save_all": True, "append_images": [rgb]}),
        "lossy.webp": (picture, {"exif": exif, "icc_profile": profile}),
        "lossless.webp": (rgb, {"lossless": True}),
        "a.gif": (
            rgb.convert("P"),
            {"transparency": 2, "save_all": True, "append_images": [rgb.convert("P")]},
        ),
        "a.bmp": (rgb, {}),
        "rgba.tiff": (picture, {"exif": exif, "icc_profile": profile}),
        "lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
        "jpeg.tiff": (rgb, {"compression": "jpeg"}),
        "lab.tiff": (Image.merge("LAB", rgb.split()), {}),
        "fax.tiff": (rgb.convert("1"), {"compression": "group4"}),
        "deep.tiff": (Image.fromarray(np.linspace(0, 65535, 768).astype(np.uint16).reshape(24, 32)), {}),
    }
    found = {}
    for name, (image, options) in forms.items():
        data = io.BytesIO()
        image.save(data, **({"format": Image.registered_extensions()[Path(name).suffix]} | options))
        found[name] = data.getvalue()
    return found


def test_damaged_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, data in pictures().items():
        (folder / name).write_bytes(data)
    done = fuzz("picture", folder, 0, seed=1)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    read = {line.split()[1] for line in done.stdout.splitlines() if line.endswith(" read")}
    assert read == set(pictures())
