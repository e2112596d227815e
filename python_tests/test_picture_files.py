"""Pictures in: files, PIL images and arrays become upright RGB or an error that names them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from magihuman_fast.errors import InputError
from magihuman_fast.picture_files import load_image


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = b"IEND"
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, end))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


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
        (tmp_path / "bomb.png").write_bytes(png_header(10_000, 9_000))
        (tmp_path / "larger_bomb.png").write_bytes(png_header(60_000, 60_000))
        for name in ("script.eps", "other.ppm"):
            Image.fromarray(noise).save(tmp_path / name)
        names = ["cut.png", "cut.jpg", "text.png", "empty.png", "folder.png", "bomb.png", "larger_bomb.png"]
        for name in [*names, "script.eps", "other.ppm", "missing.png", "x" * 300 + ".png"]:
            with pytest.raises(InputError, match=name):
                load_image(tmp_path / name)

    def test_too_many_pixels_are_refused_before_decoding(self, tmp_path: Path) -> None:
        (tmp_path / "bomb.png").write_bytes(png_header(10_000, 9_000))
        with pytest.raises(InputError, match="at most 89478485 pixels, got 10000x9000"):
            load_image(tmp_path / "bomb.png")


def test_sixteen_bit_greyscale_keeps_its_range(tmp_path: Path) -> None:
    gradient = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(gradient).save(tmp_path / "deep.png")
    pixels = np.asarray(load_image(tmp_path / "deep.png"))
    assert pixels.shape == (64, 64, 3)
    assert np.abs(pixels[..., 0].astype(int) - gradient // 257).max() <= 1


def test_floating_point_picture_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(InputError, match=r"float.tiff: image mode 'F' has no fixed range"):
        load_image(tmp_path / "float.tiff")
