"""Reference images: files, PIL images and arrays as upright, opaque sRGB (MODEL.md section 6)."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from ..errors import InputError
from ..guards.download_faults import page_or_pointer
from ..guards.file_paths import PathLike, require_input
from .picture_colours import Colours, Depth, plain_rgb
from .picture_copies import Copy, copies, too_many_parts

if TYPE_CHECKING:
    import PIL.Image
    from PIL.Image import Image

log = logging.getLogger(__name__)

_MAX_IMAGE_PIXELS = 89_478_485  # a quarter of a gigabyte as RGB
_MAX_FILE_BYTES = 768 << 20  # more than that many pixels of 16-bit RGBA take
# A closed list, because other readers do more than read: EPS runs Ghostscript.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
_thread = threading.local()  # `heard`: what Pillow has warned of while this thread reads a picture
_libtiff_lock = threading.Lock()
_readers: list[int | None] = []  # the handler that was there before, then one entry for each that reads


def load_image(
    image: PathLike | PIL.Image.Image | np.ndarray,
    *,
    background: str | tuple[int, int, int] = "white",
    convert_profile: bool = True,
) -> PIL.Image.Image:
    """A picture as upright, opaque sRGB: what `MagiHumanPipeline.__call__` makes of its `image`, with these defaults.

    Its orientation (EXIF data, XMP) is applied. What can be done without is no obstacle: where metadata are damaged or
    too large, the picture is read without them, with a warning.

    Args:
        image: a file (PNG, JPEG, WebP, BMP, TIFF, GIF; of several pictures the first), a PIL image of any mode, or
            uint8 (H, W, 3). 16-bit greyscale is scaled to 8 bits. A PIL image is loaded, not changed.
        background: colour to lay a picture on that is not opaque everywhere: a name, "#rrggbb" or (r, g, b).
        convert_profile: convert colours by the embedded ICC profile; one that changes none of them by more than
            1/255 leaves the picture as it is.

    Raises:
        InputError: no such file, not an image of a known format, truncated, over 89 million pixels, of a mode without
            a fixed range, or a background that is no colour.
    """
    colours = Colours.of(background, convert_profile)
    if isinstance(image, (str, os.PathLike)):
        path = require_input(image, "image")
        name = f"image {path}"
        try:
            with _reading(name):
                return _from_bytes(_content(path), colours, name)
        except InputError as error:
            if (found := page_or_pointer(path)) is None:
                raise
            raise InputError(f"{name}: expected a picture, found {found}") from error
    with _reading("image"):
        picture = _from_object(image, colours)
        return picture.copy() if picture is image else picture


def to_rgb(image: object) -> Image:
    """Any PIL image, or uint8 (H, W, 3), as `load_image` gives it; itself if it is that already.

    Raises:
        InputError: not an image, empty, unreadable, over 89 million pixels, or of a mode without a fixed range.
    """
    with _reading("image"):
        return _from_object(image, Colours.of("white", True))


def _from_object(image: object, colours: Colours) -> Image:
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError(f"expected a uint8 array (H, W, 3), got {image.dtype} {image.shape}")
        _check_pixels(image.shape[1], image.shape[0])
        return Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise InputError(f"expected a PIL image or a uint8 array (H, W, 3), got {type(image).__name__}")
    try:
        depth = _loaded(image, negative=False)
    except InputError:
        raise
    except Exception as error:
        data = _unread(image)
        if data is None:
            raise
        return _from_copies(data, error, colours, "image")
    return plain_rgb(image, depth, colours, "image")


def _loaded(image: Image, negative: bool) -> Depth:
    """Check a picture that may not have been read yet, then read it."""
    if not image.width or not image.height:
        raise InputError(f"expected pixels, got none: {image.width}x{image.height}")
    _check_pixels(image.width, image.height)
    depth = Depth.of(image, negative)
    image.load()
    return depth


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MAX_IMAGE_PIXELS:
        raise InputError(f"expected at most {_MAX_IMAGE_PIXELS} pixels, got {width}x{height}")


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise InputError(f"expected at most {_MAX_FILE_BYTES >> 20} MiB, got more")
    return data


def _unread(image: Image) -> bytes | None:
    """The file behind a PIL image that could not be loaded; None if there is none, or for a later picture in it."""
    file = getattr(image, "fp", None)
    if file is None or image.tell() != 0:
        return None
    try:
        place = file.tell()
        file.seek(0)
        data: bytes = file.read(_MAX_FILE_BYTES)
        file.seek(place)
    except (OSError, ValueError):
        return None
    return data


def _from_bytes(data: bytes, colours: Colours, name: str) -> Image:
    _check_canvas(data)
    if too_many_parts(data):
        return _from_copies(data, InputError("too many parts"), colours, name)
    try:
        return _opened(Copy(data, []), colours, name)
    except InputError:
        raise
    except Exception as error:
        return _from_copies(data, error, colours, name)


def _from_copies(data: bytes, first: Exception, colours: Colours, name: str) -> Image:
    """Read a file that failed as it is, because of `first`, from copies with less in them."""
    last = first
    for copy in copies(data):
        try:
            picture = _opened(copy, colours, name)
        except InputError:
            raise
        except Exception as error:
            last = error
            continue
        if copy.left_out:
            log.warning("%s: read without %s: %s", name, ", ".join(copy.left_out[:20]), _reason(first))
        return picture
    raise last


def _opened(copy: Copy, colours: Colours, name: str) -> Image:
    from PIL import Image

    # From memory: as a name, Pillow would map the file, and one that shrinks meanwhile ends the process.
    with Image.open(io.BytesIO(copy.data), formats=_IMAGE_FORMATS) as opened:
        depth = _loaded(opened, copy.negative)
        picture = plain_rgb(opened, depth, colours, name)
        return picture.copy() if picture is opened else picture


def _check_canvas(data: bytes) -> None:
    """WebP: its decoder takes the memory for all pixels as soon as it is made, before Pillow knows their number."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return
    if data[12:16] == b"VP8X":
        _check_pixels(int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1)
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        _check_pixels((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    elif data[12:16] == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        _check_pixels(width & 0x3FFF, height & 0x3FFF)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "damaged where it begins"  # what Pillow found there it does not tell
    return str(error) or type(error).__name__


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Errors become `InputError`s and Pillow's warnings log lines, each with the picture's name."""
    from PIL import Image, UnidentifiedImageError

    _hear_pillow()
    outer, _thread.heard = getattr(_thread, "heard", None), dict[str, None]()
    level = logging.DEBUG  # of a picture that is refused the error tells enough
    try:
        with _quiet_libtiff():
            yield
        level = logging.WARNING
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        known = ", ".join(_IMAGE_FORMATS)
        raise InputError(f"{name}: expected one of {known}, got something else or a damaged file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name}: expected at most {_MAX_IMAGE_PIXELS} pixels: {error}") from error
    except Exception as error:  # damaged files: OSError, SyntaxError, struct.error, MemoryError and others
        raise InputError(f"{name}: cannot be read: {_reason(error)}") from error
    finally:
        heard, _thread.heard = _thread.heard, outer
        for text in heard:
            log.log(level, "%s: %s", name, text)


def _hear_pillow() -> None:
    """From now on what Pillow warns of, or logs, while a thread reads a picture here is kept for that thread.

    Not by `warnings.catch_warnings`, which would switch the whole process to and fro under other threads. All else that
    is warned of goes on to whoever showed it before. (Whoever uses `catch_warnings` takes this back as well.)
    """
    import PIL

    library, show = os.path.dirname(PIL.__file__), warnings.showwarning
    if hasattr(show, "hears_pillow"):
        return

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        heard = getattr(_thread, "heard", None)
        if heard is not None and filename.startswith(library):
            heard[str(message)] = None
        else:
            show(message, category, filename, lineno, file, line)

    def keep(record: logging.LogRecord) -> bool:
        heard = getattr(_thread, "heard", None)
        if heard is not None and record.levelno >= logging.WARNING:
            heard[record.getMessage()] = None
        return heard is None

    showwarning.hears_pillow = True  # type: ignore[attr-defined]
    warnings.showwarning = showwarning
    logger = logging.getLogger("PIL.TiffImagePlugin")  # the only one that logs more than details
    if not any(hasattr(known, "hears_pillow") for known in logger.filters):
        keep.hears_pillow = True  # type: ignore[attr-defined]
        logger.addFilter(keep)


@contextmanager
def _quiet_libtiff() -> Iterator[None]:
    """libtiff writes on stderr what is wrong with a file; Pillow, which knows less of it, raises an error as well."""
    library = _libtiff()
    if library is None:
        yield
        return
    with _libtiff_lock:
        if not _readers:
            _readers.append(library.TIFFSetErrorHandler(None))
        _readers.append(None)
    try:
        yield
    finally:
        with _libtiff_lock:
            _readers.pop()
            if len(_readers) == 1:
                library.TIFFSetErrorHandler(_readers.pop())


@cache
def _libtiff() -> ctypes.CDLL | None:
    """The one that Pillow uses: found from its own library, because others may be loaded too."""
    from PIL import _imaging

    try:
        library = ctypes.CDLL(_imaging.__file__)
        library.TIFFSetErrorHandler.argtypes = [ctypes.c_void_p]
        library.TIFFSetErrorHandler.restype = ctypes.c_void_p
    except (OSError, AttributeError, TypeError):
        return None
    return library
