"""The orientation of a picture whose other tags Pillow gives up on: by its place in the first directory."""

from __future__ import annotations

import struct

import pytest

from magihuman_fast.codecs.picture_colours import _stored_orientation


def exif(order: str, *entries: tuple[int, int, bytes], at: int = 8) -> bytes:
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, at)
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        directory += struct.pack(order + "HHI", tag, kind, 1) + value.ljust(4, b"\0")
    return head + bytes(at - len(head)) + directory + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_by_its_place(order: str) -> None:
    byte, short, long = b"\x06", struct.pack(order + "H", 6), struct.pack(order + "I", 6)
    for kind, value in ((1, byte), (3, short), (4, long)):
        data = exif(order, (271, 2, b"abc"), (274, kind, value), (274, 3, b"\1\1"), at=10)
        assert _stored_orientation(data) == 6
        assert _stored_orientation(b"Exif\0\0Exif\0\0" + data) == 6
    assert _stored_orientation(exif(order, (274, 2, b"6"), (274, 3, short))) == 6  # a text is none
    assert _stored_orientation(exif(order, (275, 3, short))) is None
    assert _stored_orientation(exif(order, (274, 3, short))[:-7]) is None  # cut
    assert _stored_orientation(b"IM" + exif(order, (274, 3, short))[2:]) is None
    assert _stored_orientation(b"") is None
