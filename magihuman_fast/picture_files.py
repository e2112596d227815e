"""Reference images: files, PIL images and arrays as upright RGB (MODEL.md section 6)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError
from .file_paths import PathLike, require_input

if TYPE_CHECKING:
    import PIL.Image
    from PIL.Image import Image

_MAX_IMAGE_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB
# A closed list, because other readers do more than read: EPS runs Ghostscript.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")


def load_image(image: PathLike | PIL.Image.Image | np.ndarray) -> PIL.Image.Image:
    """A picture file, PIL image or uint8 array (H, W, 3) as RGB, turned upright as its EXIF data says.

    Raises:
        InputError: no such file, not an image of a known format, truncated, or over 89 million pixels.
    """
    from PIL import Image, UnidentifiedImageError

    if not isinstance(image, (str, os.PathLike)):
        return to_rgb(image)
    path = require_input(image, "image")
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as opened:
            if opened.width * opened.height > _MAX_IMAGE_PIXELS:
                size = f"{opened.width}x{opened.height}"
                raise InputError(f"expected at most {_MAX_IMAGE_PIXELS} pixels, got {size}")
            return to_rgb(opened)
    except InputError as error:
        raise InputError(f"image {path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(f"image {path}: expected one of {', '.join(_IMAGE_FORMATS)}: {error}") from error
    except Exception as error:  # damaged files: OSError, SyntaxError, struct.error and others
        raise InputError(f"image {path}: cannot be read: {error}") from error


def to_rgb(image: object) -> Image:
    """Any PIL image, turned upright by its EXIF orientation, or uint8 (H, W, 3), as RGB; alpha is dropped.

    Raises:
        InputError: not an image, empty, unreadable, or of a mode without a fixed range.
    """
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"image array must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise InputError(f"image must be a PIL image or a uint8 array (H, W, 3), got {type(image).__name__}")
    if not image.width or not image.height:
        raise InputError(f"image is empty: {image.width}x{image.height}")
    if image.mode in ("I", "F"):
        raise InputError(f"image mode {image.mode!r} has no fixed range; convert it to 8 bits first")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            # Pillow's own conversion cuts off everything above 255.
            upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
        return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image cannot be read: {error}") from error
