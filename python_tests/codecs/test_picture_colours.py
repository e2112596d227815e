"""What becomes of a picture's colours: depth, colour profile, transparency, orientation."""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from magihuman_fast.codecs.picture_files import load_image, to_rgb
from magihuman_fast.errors import InputError
from picture_cases import (
    P3,
    SRGB,
    chunk,
    cmyk_profile,
    encoded,
    grey_profile,
    png,
    rgb_profile,
    srgb_curve,
    tiff,
)

ORIENTATION = 0x0112
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., np.ndarray]:
    """The pixels of a file with these bytes, and of the same as a PIL image where Pillow opens it: the same."""

    def call(data: bytes, opens: bool = True, **options: Any) -> np.ndarray:
        (tmp_path / "picture").write_bytes(data)
        result = load_image(tmp_path / "picture", **options)
        assert (type(result), result.mode, result.info) == (Image.Image, "RGB", {})
        pixels = np.asarray(result)
        if opens:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the caller's own opening
                picture = Image.open(io.BytesIO(data))
            assert np.array_equal(np.asarray(load_image(picture, **options)), pixels)
        return pixels

    return call


def blocks() -> Image.Image:
    """48 x 32, no two corners of one colour."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0], pixels[0, 2], pixels[1, 0] = (240, 20, 20), (20, 240, 20), (20, 20, 240)
    return Image.fromarray(pixels.repeat(16, 0).repeat(16, 1))


def tagged(value: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif.tobytes()


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "PNG, EXIF last", "WEBP", "TIFF", "TIFF, packed", "memory", "XMP"]
)
def test_orientation(load: Callable[..., np.ndarray], kind: str, value: int) -> None:
    expected = UPRIGHT[value](np.asarray(blocks()))
    if kind == "memory":
        picture = blocks()
        picture.getexif()[ORIENTATION] = value
        pixels = np.asarray(load_image(picture))
        assert np.array_equal(np.asarray(picture), np.asarray(blocks()))
    elif kind == "PNG, EXIF last":
        data = encoded(blocks(), "PNG")
        pixels = load(data[:-12] + chunk(b"eXIf", tagged(value)[6:]) + data[-12:])
    elif kind == "XMP":
        data = encoded(blocks(), "PNG")
        xmp = b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="%d"/>' % value
        pixels = load(data[:33] + chunk(b"iTXt", xmp) + data[33:])
    else:
        more = {
            "JPEG": {"quality": 95},
            "WEBP": {"lossless": True},
            "TIFF, packed": {"compression": "tiff_lzw"},
        }
        options = {"exif": tagged(value)} | more.get(kind, {})
        pixels = load(encoded(blocks(), kind.split(",")[0], **options))
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected)[4::8, 4::8].max() <= (30 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("kind", "stored", "turned"),
    [
        (1, b"\x06\0\0\0", True),  # BYTE
        (4, b"\x06\0\0\0", True),  # LONG
        (2, b"6\0\0\0", True),  # ASCII
        (7, b"\x06\0\0\0", True),  # UNDEFINED
        (3, b"\0\0\0\0", False),
        (3, b"\x09\0\0\0", False),
        (2, b"up\0\0", False),
        (11, b"\0\0\xc0\x7f", False),  # FLOAT, not a number
    ],
)
def test_orientation_of_any_type(
    load: Callable[..., np.ndarray], kind: int, stored: bytes, turned: bool
) -> None:
    count = {2: 2, 7: 1}.get(kind, 1)
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", ORIENTATION, kind, count) + stored + bytes(4)
    )
    assert load(encoded(blocks(), "WEBP", exif=exif)).shape == ((48, 32, 3) if turned else (32, 48, 3))


def test_damaged_tags_do_not_stop_a_picture(
    load: Callable[..., np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    """Beside the orientation: an address that is none, a fraction of nothing, a string behind the end of the data."""
    whole = encoded(blocks(), "JPEG", exif=tagged(6))
    turned = load(whole)
    entries = {
        "position": struct.pack("<HHII", 0x8825, 4, 1, 0xFFFFFFF0),
        "fraction": struct.pack("<HHII", 0x011A, 5, 1, 0xFFFF),
        "string": struct.pack("<HHII", 0x010F, 2, 20, 100),  # Pillow reads no tag behind it
    }
    for name, entry in entries.items():
        two = sorted([entry, struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)])
        exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + b"".join(two) + bytes(4)
        caplog.clear()
        assert np.array_equal(load(encoded(blocks(), "JPEG", exif=exif)), turned), name
        assert len({record.getMessage() for record in caplog.records}) == len(caplog.records)
    caplog.clear()
    assert load(encoded(blocks(), "JPEG", exif=b"Exif\0\0" + b"nothing of the kind")).shape == (32, 48, 3)
    assert "EXIF data is damaged" in caplog.text


def test_orientation_that_was_removed_stays_so() -> None:
    picture = Image.open(io.BytesIO(encoded(blocks(), "WEBP", lossless=True, exif=tagged(6))))
    del picture.getexif()[ORIENTATION]
    assert load_image(picture).size == (48, 32)


GREYS = np.linspace(0, 65535, 16 * 12).astype(np.uint16).reshape(12, 16)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_sixteen_bit_tiff(
    load: Callable[..., np.ndarray],
    caplog: pytest.LogCaptureFixture,
    order: str,
    white_is_zero: bool,
    packed: bool,
) -> None:
    stored = (65535 - GREYS if white_is_zero else GREYS).astype(order + "u2").tobytes()
    stored, compression = (zlib.compress(stored), 8) if packed else (stored, 1)
    data = tiff(order, 16, 12, stored, t258=16, t259=compression, t262=0 if white_is_zero else 1, t296=2)
    pixels = load(data, opens=order == "<" or not white_is_zero)
    assert np.array_equal(pixels, np.repeat((GREYS // 257).astype(np.uint8)[..., None], 3, -1))
    assert not caplog.records


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_twelve_bit_tiff(load: Callable[..., np.ndarray], white_is_zero: bool) -> None:
    greys = np.linspace(0, 4095, 16 * 12).astype(int)
    a, b = (4095 - greys if white_is_zero else greys).reshape(-1, 2).T
    stored = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    data = tiff("<", 16, 12, stored, t258=12, t262=0 if white_is_zero else 1)
    pixels = load(data, opens=not white_is_zero)
    assert np.array_equal(pixels[..., 1].ravel(), greys * 255 // 4095)


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_sixteen_bit_tiff(load: Callable[..., np.ndarray], order: str) -> None:
    stored = (GREYS.astype(int) - 32768).astype(order + "i2").tobytes()
    pixels = load(tiff(order, 16, 12, stored, t258=16, t339=2))
    assert np.array_equal(pixels[..., 2], GREYS // 257)


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bit_modes(mode: str) -> None:
    order = ">" if mode == "I;16B" else "<"
    picture = Image.frombytes(mode, (16, 12), GREYS.astype(order + "u2").tobytes())
    assert np.array_equal(np.asarray(load_image(picture))[..., 0], GREYS // 257)


def test_sixteen_bit_png(load: Callable[..., np.ndarray]) -> None:
    assert np.array_equal(load(png(GREYS, 16, 0))[..., 0], GREYS // 257)
    bands = np.stack([GREYS, GREYS[::-1], GREYS[:, ::-1]], -1)
    opaque = np.full((*GREYS.shape, 1), 65535, np.uint16)
    expected = (bands // 257).astype(int)
    for kind, pixels in ((2, bands), (6, np.concatenate([bands, opaque], -1))):
        assert np.abs(load(png(pixels.reshape(12, -1), 16, kind)) - expected).max() <= 1
    grey = load(png(np.stack([GREYS, opaque[..., 0]], -1).reshape(12, -1), 16, 4))
    assert np.abs(grey - expected[..., :1]).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(tmp_path: Path, mode: str) -> None:
    picture = Image.new(mode, (8, 8))
    picture.save(tmp_path / "deep.tiff")
    for given, name in ((picture, "image"), (tmp_path / "deep.tiff", r"deep\.tiff")):
        with pytest.raises(InputError, match=rf"{name}: mode '{mode}' has no fixed range"):
            load_image(given)


def cut_out() -> Image.Image:
    """Red where it is opaque, green hidden under alpha 0, half blue between."""
    pixels = np.zeros((8, 12, 4), np.uint8)
    pixels[:, :4], pixels[:, 4:8], pixels[:, 8:] = (200, 0, 0, 255), (0, 0, 255, 128), (0, 200, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("background", "colour"),
    [
        ("white", (255, 255, 255)),
        ("#102030", (16, 32, 48)),
        ("Black", (0, 0, 0)),
        ((1, 2, 3), (1, 2, 3)),
        ("hsl(120, 100%, 50%)", (0, 255, 0)),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_background(
    load: Callable[..., np.ndarray],
    caplog: pytest.LogCaptureFixture,
    background: Any,
    colour: tuple[int, ...],
    kind: str,
) -> None:
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    pixels = load(encoded(cut_out(), kind, **options), background=background)
    half = np.round(np.array([0, 0, 255]) * 128 / 255 + np.array(colour) * 127 / 255)
    for column, expected in ((0, (200, 0, 0)), (5, half), (9, colour)):
        assert np.abs(pixels[:, column].astype(int) - expected).max() <= 1
    assert [r.levelname for r in caplog.records] == ["WARNING"] * 2  # a file, and a PIL image
    assert caplog.text.count(f"not opaque everywhere; it is laid on {background}") == 2


def transparent(mode: str) -> Image.Image:
    """Black on the left, white on the right, where it is fully transparent."""
    pixels = np.repeat(np.array([0, 255], np.uint8), 8)[None].repeat(16, 0)
    grey, alpha = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    if mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        base = grey.convert({"PA": "P"}.get(mode, mode.upper()[:-1]))
        picture = Image.merge({"La": "LA", "RGBa": "RGBA"}.get(mode, mode), (*base.split(), alpha))
        if mode == "PA":
            picture.putpalette(bytes(v for i in range(256) for v in (i, i, i)))
        return picture.convert(mode)
    if mode == "I;16":
        picture = Image.fromarray(pixels.astype(np.uint16) * 257)
        picture.info["transparency"] = 65535
        return picture
    picture = grey.convert("P" if mode == "P bytes" else mode)
    key: Any = {"P": 255, "P bytes": bytes(255) + b"\0", "L": 255, "1": 255, "RGB": (255, 255, 255)}[mode]
    picture.info["transparency"] = b"\xff" * 255 + b"\0" if mode == "P bytes" else key
    return picture


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa", "P", "P bytes", "L", "1", "RGB", "I;16"])
def test_every_form_of_transparency(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    picture = transparent(mode)
    before = (
        picture.mode,
        picture.tobytes(),
        dict(picture.info),
        picture.getpalette("RGBA") if mode[0] == "P" else 0,
    )
    pixels = np.asarray(load_image(picture, background=(9, 8, 7)))
    assert (pixels[:, :8] == 0).all()
    assert (pixels[:, 8:] == (9, 8, 7)).all()
    assert caplog.text.count("not opaque") == 1
    assert before == (
        *(picture.mode, picture.tobytes(), picture.info),
        picture.getpalette("RGBA") if mode[0] == "P" else 0,
    )


@pytest.mark.parametrize(
    ("bits", "kind", "row", "key"),
    [
        (1, 0, [0x0F], [1]),
        (2, 0, [0x00, 0xFF], [3]),
        (4, 0, [0, 0, 0xFF, 0xFF], [15]),
        (8, 0, [0] * 4 + [255] * 4, [255]),
        (16, 0, [0] * 8 + [255] * 8, [65535]),
        (8, 2, [0] * 12 + [255] * 12, [255, 255, 255]),
        (16, 2, [0] * 24 + [0, 255] * 12, [255, 255, 255]),  # in 8 bits both are black
    ],
)
def test_transparent_colour_of_a_png(
    load: Callable[..., np.ndarray], bits: int, kind: int, row: list[int], key: list[int]
) -> None:
    data = png(np.array([row] * 4, np.uint8), bits, kind, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    pixels = load(data, background=(9, 8, 7))
    assert (pixels[:, 4:] == (9, 8, 7)).all()
    if (bits, kind) != (16, 2):
        assert (pixels[:, :4] == 0).all()


def test_transparent_gif(load: Callable[..., np.ndarray]) -> None:
    pixels = load(encoded(transparent("P"), "GIF", transparency=255), background="#010203")
    assert (pixels[:, 8:] == (1, 2, 3)).all()
    assert (pixels[:, :8] == 0).all()


def test_opaque_alpha_is_no_news(load: Callable[..., np.ndarray], caplog: pytest.LogCaptureFixture) -> None:
    opaque = blocks().convert("RGBA")
    assert np.array_equal(load(encoded(opaque, "PNG"), background="red"), np.asarray(blocks()))
    assert not caplog.records


@pytest.mark.parametrize(
    "background",
    ["whitish", "#12", "#10203080", "rgb(300, 0, 0)", (1, 2), (1, 2, 256), (1, 2, -1), (1.0, 2, 3), None, 7],
)
def test_background_that_is_no_colour(background: Any) -> None:
    with pytest.raises(InputError, match=r"image background: expected a colour such as white.*got"):
        load_image("nothing.png", background=background)


def skin() -> Image.Image:
    """A gradient around (220, 160, 135), and transparent below."""
    steps = np.arange(16, dtype=np.uint8)
    pixels = np.zeros((8, 16, 3), np.uint8) + np.array([205, 150, 130], np.uint8)
    pixels[..., 0] += steps
    return Image.fromarray(pixels)


def p3_to_srgb(pixels: np.ndarray) -> np.ndarray:
    """Independent of lcms: both spaces relative to D50, as the profile gives them."""
    linear = (pixels / 255.0) ** 2.2 @ np.array(P3) @ np.linalg.inv(np.array(SRGB))
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_profile(load: Callable[..., np.ndarray], caplog: pytest.LogCaptureFixture, kind: str) -> None:
    caplog.set_level(logging.INFO, "magihuman_fast")
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encoded(skin(), kind, icc_profile=rgb_profile(P3), **options)
    stored = load(data, convert_profile=False)
    assert np.array_equal(stored, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert not caplog.records
    pixels = load(data)
    assert np.abs(pixels - p3_to_srgb(stored)).max() <= 1.5
    assert np.abs(pixels.astype(int) - stored).max() >= 8
    assert caplog.text.count("colours converted to sRGB from a test's colours") == 2
    assert {r.levelname for r in caplog.records} == {"INFO"}


def test_profile_of_srgb_changes_nothing(load: Callable[..., np.ndarray]) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(load(encoded(noise, "PNG", icc_profile=own)), np.asarray(noise))
    near = rgb_profile(np.array(SRGB) * [1, 1, 1.001], srgb_curve())
    own_way = ImageCms.profileToProfile(
        noise, ImageCms.ImageCmsProfile(io.BytesIO(near)), ImageCms.createProfile("sRGB")
    )
    assert np.abs(np.asarray(own_way, int) - np.asarray(noise)).max() == 1
    assert np.array_equal(load(encoded(noise, "PNG", icc_profile=near)), np.asarray(noise))
    other_curve = load(encoded(noise, "PNG", icc_profile=rgb_profile(SRGB)))
    assert not np.array_equal(other_curve, np.asarray(noise))


def test_profile_with_alpha(load: Callable[..., np.ndarray]) -> None:
    picture = skin()
    picture.putalpha(Image.new("L", picture.size, 128))
    pixels = load(encoded(picture, "PNG", icc_profile=rgb_profile(P3)), background="black")
    assert np.abs(pixels - p3_to_srgb(np.asarray(skin())) * 128 / 255).max() <= 1.5


def test_profile_with_a_palette(load: Callable[..., np.ndarray]) -> None:
    data = encoded(skin().quantize(16), "PNG", icc_profile=rgb_profile(P3))
    stored = load(data, convert_profile=False)
    assert np.abs(load(data) - p3_to_srgb(stored)).max() <= 1.5


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_profile_of_greys(load: Callable[..., np.ndarray], mode: str) -> None:
    grey = Image.new("L", (8, 8), 128)
    picture = (
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    )
    assert np.unique(load(encoded(picture, "PNG", icc_profile=grey_profile(1.0)))).tolist() == [188]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_profile_of_inks(load: Callable[..., np.ndarray], kind: str) -> None:
    """Paper becomes white, the darkest ink black, and what lies between with them (from L 50, 112)."""
    for inks, expected in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 112), ((0, 0, 0, 255), 0)):
        data = encoded(Image.new("CMYK", (16, 16), inks), kind, icc_profile=cmyk_profile())
        assert np.abs(load(data).astype(int) - expected).max() <= 3, inks
    assert load(data, convert_profile=False).max() == 0


def test_lab(load: Callable[..., np.ndarray]) -> None:
    lab = skin().convert("LAB")
    assert np.abs(load(encoded(lab, "TIFF")).astype(int) - np.asarray(skin())).max() <= 4


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (grey_profile(1.0), "expected one for RGB pictures, got one for GRAY"),
        (cmyk_profile(), "expected one for RGB pictures, got one for CMYK"),
        (rgb_profile(P3)[:200], "its colour profile is ignored: "),
        (b"no profile at all", "its colour profile is ignored: "),
        (rgb_profile(P3) + bytes(1 << 24), "its colour profile is ignored: expected at most"),
    ],
)
def test_profile_that_does_not_fit(caplog: pytest.LogCaptureFixture, given: bytes, reason: str) -> None:
    picture = skin()
    picture.info["icc_profile"] = given
    assert np.array_equal(np.asarray(load_image(picture)), np.asarray(skin()))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert reason in caplog.text


def test_result_says_nothing_more_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    """So that what reads it once more, as the pipeline's two stages do, changes and tells nothing."""
    picture = cut_out()
    picture.info["icc_profile"] = rgb_profile(P3)
    picture.getexif()[ORIENTATION] = 6
    once = load_image(picture)
    assert (once.mode, once.info, once.size) == ("RGB", {}, (8, 12))
    caplog.clear()
    assert to_rgb(once) is once
    assert load_image(once) is not once
    assert not caplog.records
