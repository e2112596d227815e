"""Parts of picture files for the tests: PNG chunks, TIFF files of any kind, small colour profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from magihuman_fast.codecs.picture_files import load_image

PNG = b"\x89PNG\r\n\x1a\n"
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))
SRGB = ((0.43604, 0.22248, 0.01392), (0.38512, 0.7169, 0.09706), (0.14305, 0.06061, 0.71391))

BIG_TEXT = zlib.compress(bytes(3 << 20))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    return PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def bomb(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    return png_header(width, height) + chunk(b"IEND", b"")


def png(pixels: np.ndarray, bits: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with `chunks` before its pixels, which are given as a row's bytes: uint8 (H, bytes) or uint16."""
    rows = pixels.astype(">u2").view(np.uint8) if pixels.dtype == np.uint16 else pixels
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    width = pixels.size // len(pixels) * pixels.itemsize * 8 // (bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind])
    before = b"".join(chunk(*c) for c in chunks)
    header = png_header(width, len(pixels), bits, kind)
    return header + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff(order: str, width: int, height: int, pixels: bytes, **tags: int | None) -> bytes:
    """An uncompressed grey TIFF; `tags` are t258=16 and so on, None to leave one out."""
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 278: height, 279: len(pixels)}
    values |= {int(name[1:]): value for name, value in tags.items()}
    found = sorted((tag, value) for tag, value in values.items() if value is not None)
    start = 8 + 2 + 12 * len(found) + 4
    out = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, len(found))
    for tag, value in found:
        if tag in (273, 279):
            out += struct.pack(order + "HHII", tag, 4, 1, start if tag == 273 else value)
        else:
            out += struct.pack(order + "HHIHH", tag, 3, 1, value, 0)
    return out + bytes(4) + pixels


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def profile(
    space: bytes,
    tags: Sequence[tuple[bytes, bytes]],
    connection: bytes = b"XYZ ",
    device: bytes = b"mntr",
) -> bytes:
    """An ICC profile of version 2."""
    title = b"a test's colours\0"
    described = b"desc" + bytes(4) + struct.pack(">I", len(title)) + title + bytes(78)
    tags = [(b"desc", described), *tags]
    table, body, at = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, data in tags:
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", at + len(body), len(data))
        body += data
    head = bytes(8) + bytes([2, 64, 0, 0]) + device + space + connection + bytes(12) + b"acsp"
    head = (head + bytes(28) + _fixed(0.9642, 1.0, 0.8249)).ljust(128, b"\0")
    whole = head + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def _gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def srgb_curve() -> bytes:
    x = np.linspace(0, 1, 1024)
    y = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv" + bytes(4) + struct.pack(">I", 1024) + (y * 65535).round().astype(">u2").tobytes()


def rgb_profile(primaries: Sequence[Sequence[float]], curve: bytes = _gamma(2.2)) -> bytes:
    colours = (b"r", b"g", b"b")
    places = [
        (name + b"XYZ", b"XYZ " + bytes(4) + _fixed(*values))
        for name, values in zip(colours, primaries, strict=True)
    ]
    return profile(b"RGB ", [*places, *((name + b"TRC", curve) for name in colours)])


def grey_profile(gamma: float) -> bytes:
    return profile(
        b"GRAY", [(b"wtpt", b"XYZ " + bytes(4) + _fixed(0.9642, 1.0, 0.8249)), (b"kTRC", _gamma(gamma))]
    )


def cmyk_profile() -> bytes:
    """Paper is yellowish, all inks but cyan are a dark grey of L 20, cyan alone is the middle one of L 50."""
    nodes = bytearray()
    for number in range(16):
        cyan, *others = (number >> shift & 1 for shift in (3, 2, 1, 0))
        nodes += bytes([51 if any(others) else 128 if cyan else 255, 128, 128])
    ramp = bytes(range(256))
    matrix = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(nodes) + ramp * 3
    paper = b"XYZ " + bytes(4) + _fixed(0.8, 0.84, 0.6)
    return profile(b"CMYK", [(b"wtpt", paper), (b"A2B0", table), (b"A2B1", table)], b"Lab ", b"scnr")


def gradient() -> Image.Image:
    steps = np.linspace(10, 240, 24 * 32 * 3).astype(np.uint8)
    return Image.fromarray(steps.reshape(24, 32, 3))


def loaded(tmp_path: Path, data: bytes) -> np.ndarray:
    (tmp_path / "picture").write_bytes(data)
    return np.asarray(load_image(tmp_path / "picture"))
