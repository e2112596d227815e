"""Pictures in: files, PIL images and arrays become upright RGB or an error that names them."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

import magihuman_fast
from magihuman_fast.cli import commands
from magihuman_fast.cli import program as cli
from magihuman_fast.codecs import picture_copies, picture_files
from magihuman_fast.codecs.picture_files import load_image, to_rgb
from magihuman_fast.errors import InputError
from picture_cases import BIG_TEXT, P3, bomb, chunk, encoded, gradient, loaded, rgb_profile, segment, tiff


class TestImage:
    def test_is_rgb_and_upright(self, tmp_path: Path) -> None:
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[:, :10] = (250, 10, 10)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned a quarter clockwise
        Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
        image = load_image(tmp_path / "a.png")
        assert (image.mode, image.size) == ("RGB", (20, 30))
        assert np.array_equal(np.asarray(image), np.rot90(pixels, -1))

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
    def test_other_modes_become_rgb(self, tmp_path: Path, mode: str) -> None:
        path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
        Image.new("RGB", (8, 4), (204, 204, 204)).convert(mode).save(path)
        image = load_image(str(path))
        assert image.mode == "RGB"
        assert image.getpixel((3, 3)) == (204, 204, 204)

    def test_jpeg_of_a_camera_with_two_pictures(self, tmp_path: Path) -> None:
        first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (8, 8), "blue")
        first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
        image = load_image(tmp_path / "a.jpg")
        assert image.size == (16, 16)
        assert np.asarray(image)[8, 8, 0] > 240

    def test_text_is_refused_with_the_known_formats(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("not an image")
        with pytest.raises(InputError, match=r"a\.png: expected one of PNG, JPEG"):
            load_image(tmp_path / "a.png")

    def test_unreadable_is_refused_by_name(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        for suffix in ("png", "jpg"):
            Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
            data = (tmp_path / f"whole.{suffix}").read_bytes()
            (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) // 2])
        (tmp_path / "text.png").write_text("not an image")
        (tmp_path / "empty.png").touch()
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "bomb.png").write_bytes(bomb(10_000, 9_000))
        (tmp_path / "larger_bomb.png").write_bytes(bomb(60_000, 60_000))
        for name in ("script.eps", "other.ppm"):
            Image.fromarray(noise).save(tmp_path / name)
        names = ["cut.png", "cut.jpg", "text.png", "empty.png", "folder.png", "bomb.png", "larger_bomb.png"]
        for name in [*names, "script.eps", "other.ppm", "missing.png", "x" * 300 + ".png"]:
            with pytest.raises(InputError, match=name):
                load_image(tmp_path / name)

    def test_too_many_pixels_are_refused_before_decoding(self, tmp_path: Path) -> None:
        (tmp_path / "bomb.png").write_bytes(bomb(10_000, 9_000))
        with pytest.raises(InputError, match="at most 89478485 pixels, got 10000x9000"):
            load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"zTXt", b"text\0\0" + BIG_TEXT),
        (b"iTXt", b"text\0\1\0\0\0" + BIG_TEXT),
        (b"iCCP", b"profile\0\0" + BIG_TEXT),
        (b"zTXt", b"text\0\7none"),  # an unknown method
        (b"gAMA", b"\0"),
        (b"pHYs", b""),
        (b"acTL", b"\0\0"),
        (b"fcTL", bytes(3)),
        (b"tRNS", b"\0"),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_png_with_metadata_out_of_bounds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: bytes, body: bytes, last: bool
) -> None:
    """Before or behind the pixels; the rest of it, here a profile and an orientation, still counts."""
    exif = Image.Exif()
    exif[0x0112] = 3
    whole = encoded(gradient(), "PNG", exif=exif, icc_profile=rgb_profile(P3))
    expected = loaded(tmp_path, whole)
    assert not np.array_equal(expected, np.asarray(gradient())[::-1, ::-1])
    at = len(whole) - 12 if last else 33
    spoilt = whole[:at] + chunk(name, body) + whole[at:]
    pixels = loaded(tmp_path, spoilt)
    if name == b"tRNS":  # looked for until the copy without profile and orientation
        assert np.array_equal(pixels, np.asarray(gradient()))
    else:
        assert np.array_equal(pixels, expected)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert re.search(f"picture: read without .*{name.decode()}", caplog.text)


def test_png_with_a_wrong_checksum(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = encoded(gradient(), "PNG")
    bad = chunk(b"tEXt", b"key\0value")[:-1] + b"!"
    assert np.array_equal(loaded(tmp_path, whole[:33] + bad + whole[33:]), np.asarray(gradient()))
    assert "read without tEXt: damaged where it begins" in caplog.text
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encoded(gradient(), "PNG", exif=exif)
    bad = chunk(b"iCCP", b"profile\0\0" + zlib.compress(rgb_profile(P3)))[:-1] + b"!"
    pixels = loaded(tmp_path, turned[:33] + bad + turned[33:])
    assert np.array_equal(pixels, np.asarray(gradient())[::-1, ::-1])
    (tmp_path / "picture").write_bytes(whole[:32] + b"!" + whole[33:])
    with pytest.raises(InputError, match=r"picture: "):  # of the size itself
        load_image(tmp_path / "picture")


def test_png_copy_keeps_orientation_in_xmp(tmp_path: Path) -> None:
    whole = encoded(gradient(), "PNG")
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<a tiff:Orientation="3"/>'
    spoilt = whole[:33] + chunk(b"zTXt", b"text\0\0" + BIG_TEXT) + chunk(b"iTXt", xmp) + whole[33:]
    assert np.array_equal(loaded(tmp_path, spoilt), np.asarray(gradient())[::-1, ::-1])


@pytest.mark.parametrize(
    ("marker", "body", "without"),
    [
        (0xE0, b"JFIF\0", "APP0"),
        (0xE2, b"ICC_PROFILE\0", "APP2"),
        (0xEE, b"Adobe", "APP14"),
    ],
)
def test_jpeg_with_a_malformed_segment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, marker: int, body: bytes, without: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(gradient(), "JPEG", exif=exif)
    spoilt = whole[:2] + segment(marker, body) + whole[2:]
    assert np.array_equal(loaded(tmp_path, spoilt), loaded(tmp_path, whole))
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert f"read without {without}" in caplog.text


def test_jpeg_keeps_what_its_colours_need(tmp_path: Path) -> None:
    """Of a copy: the Adobe segment, which says how inks and colours are coded, and the profile."""
    inks = bytearray(encoded(gradient().convert("CMYK"), "JPEG"))
    inks[inks.index(b"Adobe") + 11] = 2  # as brightness, two differences, and black
    for whole in (bytes(inks), encoded(gradient(), "JPEG", icc_profile=rgb_profile(P3))):
        spoilt = whole[:2] + segment(0xE0, b"JFIF\0") + whole[2:]
        assert np.array_equal(loaded(tmp_path, spoilt), loaded(tmp_path, whole))


def test_webp_cut_within_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = encoded(gradient(), "WEBP", lossless=True, xmp=b"x" * 1000, icc_profile=rgb_profile(P3))
    assert np.array_equal(loaded(tmp_path, whole[:-500]), loaded(tmp_path, whole))
    assert "read without XMP: " in caplog.text
    with pytest.raises(InputError, match="cannot be read"):
        loaded(tmp_path, whole[:-1100])


@pytest.mark.parametrize("order", ["<", ">"])
def test_tiff_with_odd_tags(tmp_path: Path, caplog: pytest.LogCaptureFixture, order: str) -> None:
    greys = np.arange(16 * 12, dtype=np.uint8)
    # Its resolution is in centimetres and no number.
    data = tiff(order, 16, 12, greys.tobytes(), t274=3, t282=5, t283=5, t296=3)
    at = data.index(struct.pack(order + "HHI", 282, 3, 1))
    spoilt = data[: at + 2] + struct.pack(order + "HI", 2, 4) + b"abc\0" + data[at + 12 :]
    assert np.array_equal(loaded(tmp_path, spoilt)[..., 0].ravel(), greys[::-1])
    assert "read without tag 282" in caplog.text


def test_pil_image_with_damaged_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = encoded(gradient(), "PNG")
    spoilt = whole[:-12] + chunk(b"zTXt", b"text\0\0" + BIG_TEXT) + whole[-12:]
    picture = Image.open(io.BytesIO(spoilt))
    assert np.array_equal(np.asarray(load_image(picture)), np.asarray(gradient()))
    assert "image: read without zTXt" in caplog.text
    (tmp_path / "a.png").write_bytes(spoilt)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(gradient()))


def test_pil_image_is_left_as_it_was() -> None:
    for picture in (
        Image.open(io.BytesIO(encoded(gradient(), "PNG", icc_profile=rgb_profile(P3)))),
        gradient(),
    ):
        before = (dict(picture.info), picture.tobytes())
        result = load_image(picture)
        result.paste((0, 0, 0), (0, 0, 5, 5))
        assert before == (picture.info, picture.tobytes())


def test_later_picture_of_a_file() -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    picture = Image.open(io.BytesIO(encoded(red, "TIFF", save_all=True, append_images=[blue])))
    picture.seek(1)
    assert load_image(picture).getpixel((3, 3)) == (0, 0, 255)
    data = encoded(red, "TIFF", save_all=True, append_images=[blue], compression="tiff_adobe_deflate")
    at = data.rindex(b"\x78\x9c")  # the second's pixels
    picture = Image.open(io.BytesIO(data[:at] + bytes(2) + data[at + 2 :]))
    picture.seek(1)
    with pytest.raises(InputError, match="image: cannot be read"):
        load_image(picture)


def closed() -> Image.Image:
    picture = gradient()
    picture.close()
    return picture


def closed_file() -> Image.Image:
    picture = Image.open(io.BytesIO(encoded(gradient(), "PNG")))
    picture.close()
    return picture


def cut_file() -> Image.Image:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    return Image.open(io.BytesIO(encoded(noise, "JPEG")[:2000]))


class Out(Image.Image):
    """Memory runs out as its pixels are read."""

    def load(self) -> Any:
        raise MemoryError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (closed, "image: cannot be read: "),
        (closed_file, "image: cannot be read: "),
        (cut_file, "image: cannot be read: image file is truncated"),
        (lambda: Image.new("RGB", (0, 5)), "image: expected pixels, got none: 0x5"),
        (
            lambda: np.zeros((8, 8), np.uint8),
            r"image: expected a uint8 array \(H, W, 3\), got uint8 \(8, 8\)",
        ),
        (lambda: np.zeros((8, 8, 3)), "image: expected a uint8 array .*, got float64"),
        (lambda: 3, "image: expected a PIL image or a uint8 array .*, got int"),
    ],
)
def test_objects_that_are_no_picture(make: Any, message: str) -> None:
    for read in (load_image, to_rgb):
        with pytest.raises(InputError, match=message):
            read(make())


def test_memory_that_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = Out()
    picture._mode, picture._size = "RGB", (8, 8)
    with pytest.raises(InputError, match="image: cannot be read: MemoryError"):
        load_image(picture)
    gradient().save(tmp_path / "a.bmp")

    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(InputError, match=r"image .*a\.bmp: cannot be read: MemoryError"):
        load_image(tmp_path / "a.bmp")


def test_too_many_pixels_of_objects() -> None:
    for picture in (np.broadcast_to(np.uint8(3), (9000, 10000, 3)), Image.new("1", (10000, 9000))):
        with pytest.raises(InputError, match="image: expected at most 89478485 pixels, got 10000x9000"):
            load_image(picture)


def test_canvas_of_a_webp_is_checked_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_(*args: object, **options: object) -> None:
        pytest.fail("the decoder was made")

    monkeypatch.setattr(Image, "open", open_)
    size = (9_999).to_bytes(3, "little") + (8_999).to_bytes(3, "little")
    heads = [
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + size,
        b"VP8L" + struct.pack("<IB", 10, 0x2F) + struct.pack("<I", 9_999 | 8_999 << 14) + bytes(20),
        b"VP8 " + struct.pack("<I", 10) + bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", 10_000, 9_000),
    ]
    for head in heads:
        (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", len(head) + 4) + b"WEBP" + head)
        with pytest.raises(InputError, match="at most 89478485 pixels, got 10000x9000"):
            load_image(tmp_path / "a.webp")


def test_file_of_endless_parts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from a copy at once: Pillow would keep each of them."""
    monkeypatch.setattr(picture_copies, "_MAX_PARTS", 100)
    monkeypatch.setattr(picture_copies, "_MAX_JUNK", 1000)
    png, jpeg = encoded(gradient(), "PNG"), encoded(gradient(), "JPEG")
    spoilt = {
        "parts.png": png[:33] + chunk(b"prVt", b"") * 101 + png[33:],
        "parts.jpg": jpeg[:2] + segment(0xE5, b"") * 101 + jpeg[2:],
        "junk.jpg": jpeg[:2] + bytes(1001) + jpeg[2:],
    }
    for name, data in spoilt.items():
        assert not picture_copies.too_many_parts({"png": png, "jpg": jpeg}[name[-3:]])
        assert picture_copies.too_many_parts(data), name
        whole = loaded(tmp_path, png if name.endswith("png") else jpeg)
        assert np.array_equal(loaded(tmp_path, data), whole)
    assert "read without prVt: too many parts" in caplog.text


def test_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_files, "_MAX_FILE_BYTES", 1 << 20)
    (tmp_path / "a.png").write_bytes(encoded(gradient(), "PNG") + bytes(1 << 20))
    with pytest.raises(InputError, match=r"a\.png: expected at most 1 MiB, got more"):
        load_image(tmp_path / "a.png")


def test_is_offered_by_the_package() -> None:
    assert magihuman_fast.load_image is load_image


def test_options_of_the_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), (9, 8, 7, 0))
    picture.putpixel((3, 3), (220, 160, 135, 255))
    picture.save(tmp_path / "face.png", icc_profile=rgb_profile(P3))
    request = ["generate", "--model", tiny_checkpoint, "--prompt", "Hello.", "--output", "out.mp4"]
    request += ["--image", tmp_path / "face.png"]

    def seen(*options: str) -> tuple[object, ...]:
        parsed = cli.build_parser().parse_args([*map(str, request), *options])
        image = commands._checked_request(parsed)["image"]
        return image.getpixel((0, 0)), image.getpixel((3, 3))

    background, skin = seen()
    assert background == (255, 255, 255)
    assert skin[0] > 225
    stored = seen("--image-background", "#102030", "--keep-image-profile")
    assert stored == ((16, 32, 48), (220, 160, 135))
