"""What Pillow and libtiff say of a picture while it is read is told once, with its name, and by the log alone."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

import magihuman_fast
from magihuman_fast.codecs import picture_files
from magihuman_fast.codecs.picture_files import load_image
from magihuman_fast.errors import InputError
from picture_cases import BIG_TEXT, PNG, bomb, chunk, encoded, gradient, loaded, segment, tiff


def malformed() -> bytes:
    """A JPEG that Pillow warns of."""
    jpeg = encoded(gradient(), "JPEG")
    return jpeg[:2] + segment(0xE2, b"MPF\0II*\0\x08\0\0\0\0\0") + jpeg[2:]


def test_pillows_warnings_are_logged_once_with_the_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        loaded(tmp_path, malformed())
    assert {r.name for r in caplog.records} == {"magihuman_fast.codecs.picture_files"}
    assert len({r.getMessage() for r in caplog.records}) == len(caplog.records)
    assert "picture: Image appears to be a malformed MPO file" in caplog.text
    assert capsys.readouterr().err == ""


def test_warnings_that_are_errors_do_not_stop_a_picture(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(loaded(tmp_path, malformed()), loaded(tmp_path, encoded(gradient(), "JPEG")))
    assert "malformed MPO file" in caplog.text


def test_reading_changes_nothing_for_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread catches warnings from the midst of one reading to the midst of the next."""
    (tmp_path / "a.png").write_bytes(encoded(gradient(), "PNG"))
    inside, leave, check = threading.Event(), threading.Event(), picture_files._check_canvas

    def catch() -> None:
        with warnings.catch_warnings():
            inside.set()
            leave.wait(10)

    other = threading.Thread(target=catch)

    def meanwhile(data: bytes) -> None:
        if not inside.is_set():
            other.start()
            inside.wait(10)
        else:
            leave.set()
            other.join(10)
        check(data)

    monkeypatch.setattr(picture_files, "_check_canvas", meanwhile)
    before = list(warnings.filters)
    for _ in range(2):
        load_image(tmp_path / "a.png")
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="seen"):
        warnings.warn("seen", UserWarning, stacklevel=1)


def test_warnings_of_others_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = picture_files._check_canvas

    def meanwhile(data: bytes) -> None:
        warnings.warn_explicit("of another thread", UserWarning, "elsewhere.py", 1)
        check(data)

    monkeypatch.setattr(picture_files, "_check_canvas", meanwhile)
    with pytest.warns(UserWarning, match="of another thread"):
        loaded(tmp_path, encoded(gradient(), "PNG"))


STDERR = """
import logging, sys
from magihuman_fast import InputError, load_image
logging.getLogger("magihuman_fast").addHandler(logging.NullHandler())
for name in sys.argv[1:]:
    try:
        load_image(name)
    except InputError:
        print("refused")
"""


def test_nothing_on_stderr(tmp_path: Path) -> None:
    """Pillow's warnings and its logger's errors, libtiff's messages: of pictures that are refused."""
    packed = bytearray(encoded(gradient(), "TIFF", compression="tiff_adobe_deflate"))
    packed[8:30] = bytes(22)
    cases = {
        "packed.tif": bytes(packed),
        "samples.tif": tiff("<", 8, 8, bytes(64), t277=5000),
        "bomb.png": bomb(10_000, 9_000),
        "larger_bomb.png": bomb(60_000, 60_000),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    names = [str(tmp_path / name) for name in cases]
    done = subprocess.run(
        [sys.executable, "-c", STDERR, *names],
        capture_output=True,
        text=True,
        cwd=Path(magihuman_fast.__file__).parent.parent,
    )
    assert (done.stdout, done.stderr) == ("refused\n" * len(cases), "")


def test_pillows_settings_are_left_alone(tmp_path: Path) -> None:
    def settings() -> tuple[object, ...]:
        return (
            *(ImageFile.LOAD_TRUNCATED_IMAGES, PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS),
            *(list(warnings.filters), logging.getLogger("PIL").handlers[:]),
        )

    before = settings()
    whole = encoded(gradient(), "PNG")
    loaded(tmp_path, whole[:33] + chunk(b"zTXt", b"text\0\0" + BIG_TEXT) + whole[33:])
    with pytest.raises(InputError):
        loaded(tmp_path, PNG)
    assert settings() == before
