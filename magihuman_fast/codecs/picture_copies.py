"""Copies of picture files without metadata, for files whose pixels are right and whose metadata are not.

Pillow refuses some pictures for what they say beside the pixels: a checksum of a comment, a text or a profile that
unpacks to more than a megabyte, an index of further pictures. A copy holds what pixels, colours, transparency and
orientation need, a second one less, each with the names of what it lacks.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

_PNG = b"\x89PNG\r\n\x1a\n"
_MAX_UNPACKED = 1 << 20  # of a profile or text, as Pillow allows
_MAX_PARTS = 1 << 17  # 89 million pixels of 16-bit RGBA in chunks of 8 KiB have fewer
_MAX_JUNK = 1 << 20
_JPEG_MARKER = re.compile(rb"\xff+([^\xff\x00])")
_WEBP_PIXELS = (b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L")
_WEBP_NEEDED = (b"ICCP", b"EXIF", b"XMP ")
# Sizes, depth, layout, compression, palette, the meaning of channels.
_TIFF_PIXELS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325}
_TIFF_PIXELS |= {338, 339, 347, *range(512, 522), 529, 530, 531, 532}
_TIFF_NEEDED = _TIFF_PIXELS | {274, 700, 34675}  # orientation, XMP, profile
_PHOTOMETRIC, _BITS = 262, 258


class Copy(NamedTuple):
    """A file's bytes without the parts named in `left_out`; `negative`: its greys are to be inverted."""

    data: bytes
    left_out: list[str]
    negative: bool = False


def copies(data: bytes) -> Iterator[Copy]:
    """Copies of a PNG, JPEG, WebP or TIFF file, each with less than the one before; none of other files."""
    if data.startswith(_PNG):
        for keep in (_png_needed, lambda name, body: name == b"tRNS", lambda name, body: False):
            yield _png_copy(data, keep)
    elif data.startswith(b"\xff\xd8"):
        for keep in (_jpeg_needed, _jpeg_pixels):
            yield _jpeg_copy(data, keep)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield _webp_copy(data)
    elif data[:2] in (b"II", b"MM") and (42 in data[2:4] or 43 in data[2:4]):
        yield from _tiff_copies(data)


def too_many_parts(data: bytes) -> bool:
    """Whether a PNG or JPEG file has so many parts, or so much between them, that Pillow takes minutes or gigabytes."""
    if not data.startswith((_PNG, b"\xff\xd8")):
        return False
    count, junk, before = 0, 0, 2
    if data.startswith(_PNG):
        return any(number >= _MAX_PARTS for number, _ in enumerate(_png_chunks(data)))
    for _, start, end in _jpeg_segments(data):
        count, junk, before = count + 1, junk + start - before, end
        if count > _MAX_PARTS or junk > _MAX_JUNK:
            return True
    return False


def _names(left_out: list[bytes]) -> list[str]:
    return list(dict.fromkeys(name.decode("ascii", "replace") for name in left_out))


def _unpacks(data: bytes) -> bool:
    try:
        stream = zlib.decompressobj()
        stream.decompress(data, _MAX_UNPACKED)
    except zlib.error:
        return False
    return not stream.unconsumed_tail


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, start, end) of each chunk, with length and checksum; the last may end behind the data."""
    at = len(_PNG)
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        yield name, at, at + 12 + length
        at += 12 + length
        if name == b"IEND":
            return


def _png_needed(name: bytes, body: bytes) -> bool:
    if len(body) > _MAX_UNPACKED:
        return False
    key, _, rest = body.partition(b"\0")
    if name in (b"iCCP", b"zTXt"):
        return (name == b"iCCP" or key == b"Raw profile type exif") and _unpacks(rest[1:])
    if name == b"iTXt":
        return key == b"XML:com.adobe.xmp" and rest[:1] == b"\0"
    return name in (b"tRNS", b"eXIf") or (name == b"tEXt" and key == b"Raw profile type exif")


def _png_copy(data: bytes, keep: Callable[[bytes, bytes], bool]) -> Copy:
    parts, left_out = [_PNG], []
    for name, start, end in _png_chunks(data):
        if name in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            parts.append(data[start:end])
            continue
        checksum = zlib.crc32(data[start + 4 : end - 4]).to_bytes(4, "big")
        if end <= len(data) and data[end - 4 : end] == checksum and keep(name, data[start + 8 : end - 4]):
            parts.append(data[start:end])
        else:
            left_out.append(name)
    return Copy(b"".join(parts), _names(left_out))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment with a length; the last is the first scan, with all that follows it."""
    at = 2
    while found := _JPEG_MARKER.search(data, at):
        marker, start = found[1][0], found.end() - 2
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        at = start + 2
        if marker == 0xDA:
            yield marker, start, len(data)
            return
        if length >= 2 and not 0xD0 <= marker <= 0xD9 and marker != 0x01:
            at += length
            yield marker, start, at


def _jpeg_pixels(marker: int, body: bytes) -> bool:
    """Colours depend on these two: whether they are RGB, YCbCr, CMYK, and inverted."""
    return (marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14) or (
        marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12
    )


def _jpeg_needed(marker: int, body: bytes) -> bool:
    return (
        _jpeg_pixels(marker, body)
        or (marker == 0xE1 and body.startswith((b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0")))
        or (marker == 0xE2 and body[:12] == b"ICC_PROFILE\0" and len(body) > 14)
    )


def _jpeg_copy(data: bytes, keep: Callable[[int, bytes], bool]) -> Copy:
    parts, left_out = [data[:2]], []
    for marker, start, end in _jpeg_segments(data):
        if (0xE0 <= marker <= 0xEF or marker == 0xFE) and not keep(marker, data[start + 4 : end]):
            left_out.append(b"comment" if marker == 0xFE else b"APP%d" % (marker - 0xE0))
        else:
            parts.append(data[start:end])
    return Copy(b"".join(parts), _names(left_out))


def _webp_copy(data: bytes) -> Copy:
    parts, left_out, at = [b"WEBP"], [], 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        if name in _WEBP_PIXELS or (name in _WEBP_NEEDED and end <= len(data)):
            parts.append(data[at:end])
        else:
            left_out.append(name.strip())
        at = end
    body = b"".join(parts)
    return Copy(b"RIFF" + struct.pack("<I", len(body)) + body, _names(left_out))


def _tiff_copies(data: bytes) -> Iterator[Copy]:
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    where, count, entry = ("Q", "Q", "HHQ8s") if big else ("I", "H", "HHI4s")
    at_offset = 8 if big else 4
    try:
        (at,) = struct.unpack_from(order + where, data, at_offset)
        (number,) = struct.unpack_from(order + count, data, at)
    except struct.error:
        return
    size = struct.calcsize(order + entry)
    at += struct.calcsize(order + count)
    end = min(at + number * size, len(data))
    entries = [
        (struct.unpack_from(order + "H", data, place)[0], data[place : place + size])
        for place in range(at, end - size + 1, size)
    ]
    values = {tag: struct.unpack_from(order + "H", raw, size - at_offset)[0] for tag, raw in entries}
    # Pillow reads deep greys that begin at white only in some byte orders and depths.
    negative = values.get(_PHOTOMETRIC) == 0 and values.get(_BITS) in (12, 16)
    levels = [set(values)] if negative else []
    for keep in [*levels, _TIFF_NEEDED, _TIFF_PIXELS]:
        kept = [raw for tag, raw in entries if tag in keep]
        if negative:
            black_is_zero = struct.pack(order + entry, _PHOTOMETRIC, 3, 1, struct.pack(order + "H", 1))
            kept = [black_is_zero if raw[:2] == black_is_zero[:2] else raw for raw in kept]
        directory = struct.pack(order + count, len(kept)) + b"".join(kept) + bytes(8 if big else 4)
        place = len(data) + len(data) % 2
        head = data[:at_offset] + struct.pack(order + where, place)
        left_out = [b"tag %d" % tag for tag, _ in entries if tag not in keep]
        rest = data[len(head) :] + bytes(len(data) % 2)
        yield Copy(head + rest + directory, _names(left_out), negative)
