"""What a copy of a picture file keeps, part by part; whether it can be read is tested with the files."""

from __future__ import annotations

import struct
import zlib

import pytest

from magihuman_fast.codecs.picture_copies import copies

MIB = 1 << 20


def chunk(name: bytes, body: bytes = b"", wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ wrong)


def packed(size: int) -> bytes:
    return zlib.compress(bytes(size))


# (a part, the number of copies that have it)
PNG = [
    (chunk(b"IHDR", b"sizes"), 3),
    (chunk(b"gAMA", b"1234"), 0),
    (chunk(b"iCCP", b"name\0\0" + packed(MIB // 2)), 1),
    (chunk(b"iCCP", b"name\0\0" + packed(2 * MIB)), 0),
    (chunk(b"iCCP", b"name\0\0no zlib"), 0),
    (chunk(b"eXIf", b"MM"), 1),
    (chunk(b"eXIf", b"MM", wrong=1), 0),
    (chunk(b"eXIf", bytes(MIB)), 1),
    (chunk(b"eXIf", bytes(MIB + 1)), 0),
    (chunk(b"tEXt", b"Raw profile type exif\0text"), 1),
    (chunk(b"tEXt", b"Comment\0text"), 0),
    (chunk(b"zTXt", b"Raw profile type exif\0\0" + packed(9)), 1),
    (chunk(b"zTXt", b"Raw profile type exif\0\0" + packed(2 * MIB)), 0),
    (chunk(b"zTXt", b"Comment\0\0" + packed(9)), 0),
    (chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"), 1),
    (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0<x/>"), 0),  # compressed
    (chunk(b"iTXt", b"XML:com.adobe.xmp\0"), 0),
    (chunk(b"iTXt", b"Comment\0\0\0\0\0text"), 0),
    (chunk(b"PLTE", b"RGB"), 3),
    (chunk(b"tRNS", b"1"), 2),
    (chunk(b"IDAT", b"pixels", wrong=1), 3),
    (chunk(b"IEND"), 3),
]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


JPEG = [
    (segment(0xE0, b"JFIF\0" + bytes(9)), 2),
    (segment(0xE0, b"JFIF\0" + bytes(8)), 0),
    (segment(0xE0, b"JFXX\0" + bytes(9)), 0),
    (segment(0xE1, b"Exif\0\0MM"), 1),
    (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"), 1),
    (segment(0xE1, b"other"), 0),
    (segment(0xE2, b"ICC_PROFILE\0\1\1p"), 1),
    (segment(0xE2, b"ICC_PROFILE\0\1\1"), 0),
    (segment(0xE2, b"MPF\0" + bytes(20)), 0),
    (segment(0xEE, b"Adobe" + bytes(7)), 2),
    (segment(0xEE, b"Adobe" + bytes(6)), 0),
    (segment(0xEF, b"last"), 0),
    (segment(0xFE, b"a comment"), 0),
    (segment(0xF0, b"no application's"), 2),
    (segment(0xDB, b"a table"), 2),
    (segment(0xDA, b"head") + b"\xff\xe0\0\4of the scan", 2),
]


@pytest.mark.parametrize(
    ("start", "parts", "names"),
    [
        (b"\x89PNG\r\n\x1a\n", PNG, ["gAMA", "iCCP", "eXIf", "tEXt", "zTXt", "iTXt"]),
        (b"\xff\xd8", JPEG, ["APP0", "APP1", "APP2", "APP14", "APP15", "comment"]),
    ],
    ids=["PNG", "JPEG"],
)
def test_each_copy_keeps_less(start: bytes, parts: list[tuple[bytes, int]], names: list[str]) -> None:
    found = list(copies(start + b"".join(part for part, _ in parts)))
    assert len(found) == max(count for _, count in parts)
    for place, copy in enumerate(found):
        assert copy.data == start + b"".join(part for part, count in parts if count > place)
        assert not copy.negative
    assert found[0].left_out == names
    # A kind of which one part was left out before keeps its place.
    assert [set(copy.left_out) - set(names) for copy in found] == [set(), set(), {"tRNS"}][: len(found)]


def test_png_that_ends_early() -> None:
    """What lacks its end is no metadata that is kept; pixels are, as far as they go."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", b"sizes")
    (first, *_) = copies(start + chunk(b"eXIf", b"MM")[:-1])
    assert (first.data, first.left_out) == (start, ["eXIf"])
    (first, *_) = copies(start + chunk(b"IDAT", b"pixels")[:-7])
    assert first.data == start + chunk(b"IDAT", b"pixels")[:-7]
    (first, *_) = copies(start + chunk(b"IEND") + chunk(b"eXIf", b"MM"))
    assert (first.data, first.left_out) == (start + chunk(b"IEND"), [])


def test_webp() -> None:
    def riff(*parts: bytes) -> bytes:
        return b"RIFF" + struct.pack("<I", 4 + sum(map(len, parts))) + b"WEBP" + b"".join(parts)

    def part(name: bytes, body: bytes) -> bytes:
        return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)

    names = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L", b"ICCP", b"EXIF", b"XMP ")
    kept = [part(name, b"odd") for name in names]
    (copy,) = copies(riff(part(b"NOTE", b"even"), *kept, part(b"odd ", b"1"), part(b"VP8 ", b"")))
    assert copy.data == riff(*kept, part(b"VP8 ", b""))
    assert copy.left_out == ["NOTE", "odd"]
    for name in (b"VP8 ", b"EXIF"):
        (copy,) = copies(riff(kept[0], part(name, b"even")[:-1]))
        # Pixels are kept as far as they go.
        assert copy.data == (riff(kept[0], part(name, b"even")[:-1]) if name == b"VP8 " else riff(kept[0]))


def tiff(order: str, tags: dict[int, int], big: bool = False) -> bytes:
    """A TIFF file that is nothing but a directory of short numbers, eight bytes behind its head."""
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "H", 43 if big else 42)
    head += struct.pack(order + ("HHQ" if big else "I"), *((8, 0, 24) if big else (16,))) + b"8 bytes."
    where, entry = ("Q", "HHQHHHH") if big else ("H", "HHIHH")
    head += struct.pack(order + where, len(tags))
    for tag, value in tags.items():
        head += struct.pack(order + entry, tag, 3, 1, value, *([0] * (3 if big else 1)))
    return head + bytes(8 if big else 4)


def directory(order: str, data: bytes, big: bool = False) -> dict[int, int]:
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, at)
    at, size = at + (8 if big else 2), (20 if big else 12)
    places = range(at, at + count * size, size)
    tags = {struct.unpack_from(order + "H", data, place)[0]: place for place in places}
    assert data[at + count * size :].rstrip(b"\0") == b""  # no further picture
    return {
        tag: struct.unpack_from(order + "H", data, place + size - (8 if big else 4))[0]
        for tag, place in tags.items()
    }


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff(order: str, big: bool) -> None:
    needed, pixels = (
        {274: 6, 700: 1, 34675: 1},
        {256: 9, 258: 8, 262: 1, 273: 8, 338: 2, 512: 1, 521: 1, 532: 1},
    )
    plain = tiff(order, {**pixels, **needed, 275: 7, 305: 1, 34665: 3, 511: 1, 522: 1}, big)
    first, second = copies(plain)
    assert directory(order, first.data, big) == pixels | needed
    assert directory(order, second.data, big) == pixels
    assert first.left_out == ["tag 275", "tag 305", "tag 34665", "tag 511", "tag 522"]
    assert set(second.left_out) - set(first.left_out) == {"tag 274", "tag 700", "tag 34675"}
    head = 16 if big else 8
    for copy in (first, second):
        assert copy.data[head : len(plain)] == plain[head:]
        assert not copy.negative
    assert [directory(order, copy.data, big) for copy in copies(tiff(order, {256: 9}, big))] == [{256: 9}] * 2


@pytest.mark.parametrize("order", ["<", ">"])
def test_greys_of_a_tiff_that_begin_at_white(order: str) -> None:
    for bits, zero, negative in ((12, 0, True), (16, 0, True), (8, 0, False), (16, 1, False), (12, 2, False)):
        found = list(copies(tiff(order, {256: 9, 258: bits, 262: zero, 305: 1})))
        assert [copy.negative for copy in found] == [negative] * (3 if negative else 2)
        for copy in found:
            assert directory(order, copy.data)[262] == (1 if negative else zero)
        assert (305 in directory(order, found[0].data)) is negative  # the first one only changes that


def test_other_files_have_none() -> None:
    whole = tiff("<", {256: 9})
    for data in (
        b"",
        b"GIF89a",
        b"RIFF1234WAVE",
        b"II\1\1" + whole[4:],
        whole[:6],
        whole[:17],
    ):
        assert list(copies(data)) == []
