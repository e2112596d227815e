"""A picture's colours as sRGB: depth, colour profile, transparency, orientation (MODEL.md section 6)."""

from __future__ import annotations

import io
import logging
import struct
from dataclasses import dataclass
from functools import cache
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # in EXIF data and in TIFF files
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339
_MAX_PROFILE = 1 << 24
_PROFILES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # by mode, as profiles name their kind
# A PNG's transparent colour is given at the file's depth, its pixels in 8 bits.
_KEY_SCALES = {"L;2": (85, 1), "L;4": (17, 1), "RGB;16B": (1, 256)}


@dataclass(frozen=True)
class Colours:
    """How colours become RGB: what shines through where a picture is transparent, and whether profiles count."""

    background: tuple[int, int, int]
    background_name: str
    convert_profile: bool

    @classmethod
    def of(cls, background: object, convert_profile: bool) -> Colours:
        """Raises: InputError: `background` is no opaque colour."""
        from PIL import ImageColor

        colour: Any = background
        if isinstance(background, str):
            try:
                colour = ImageColor.getrgb(background)
            except ValueError:
                colour = ()
        values = tuple(colour) if isinstance(colour, (tuple, list)) else ()
        whole = [isinstance(v, Integral) and not isinstance(v, bool) for v in values]
        if len(values) != 3 or not all(whole) or min(values) < 0 or max(values) > 255:
            raise InputError(
                "image background: expected a colour such as white, #ffcc00 or (255, 204, 0), "
                f"got {background!r}"
            )
        red, green, blue = map(int, values)
        return cls((red, green, blue), str(background), convert_profile)


@dataclass(frozen=True)
class Depth:
    """What is known of a picture before its pixels are read: how they lie in the file, how greys become 8 bits."""

    raw_mode: str
    greys: tuple[int, int] | None  # the values of black and white, of modes that do not say
    negative: bool

    @classmethod
    def of(cls, image: Image, negative: bool) -> Depth:
        """Raises: InputError: a mode without a known range."""
        tags = getattr(image, "tag_v2", {})
        bits, signed = tags.get(_BITS), tags.get(_SAMPLE_FORMAT) == (2,)
        greys = None
        if image.mode.startswith("I;16"):
            greys = (0, 4095 if bits == (12,) else 65535)
            negative = negative or tags.get(_PHOTOMETRIC) == 0
        elif image.mode == "I" and image.format in ("PNG", "PPM"):
            greys = (0, 65535)
        elif image.mode == "I" and bits == (16,) and signed:
            greys = (-32768, 32767)
        elif image.mode in ("I", "F"):
            raise InputError(f"mode {image.mode!r} has no fixed range; convert it to 8 bits first")
        tile = getattr(image, "tile", None)
        arguments = tile[0][3] if tile else ""
        raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        return cls(str(raw_mode), greys, negative)


def plain_rgb(image: Image, depth: Depth, colours: Colours, name: str) -> Image:
    """A loaded picture, upright, in sRGB and opaque; itself if it is so and says nothing else of itself."""
    turn = _orientation(image, name)
    if turn == 1 and image.mode == "RGB" and not image.info:
        return image
    colour, alpha = _split(image, depth)
    profile = image.info.get("icc_profile") if colours.convert_profile else None
    rgb = _in_srgb(colour, profile, name)
    if alpha is not None and alpha.getextrema()[0] != 255:
        from PIL.Image import composite, new

        log.warning("%s: not opaque everywhere; it is laid on %s", name, colours.background_name)
        rgb = composite(rgb, new("RGB", rgb.size, colours.background), alpha)
    if turn != 1:
        rgb = _turned(rgb, turn)
    elif rgb is image:
        rgb = image.copy()
    rgb.info = {}
    return rgb


def _split(image: Image, depth: Depth) -> tuple[Image, Image | None]:
    """Colours as L, RGB, CMYK or LAB, and alpha as L where there may be any."""
    from PIL.Image import fromarray

    mode, key = image.mode, image.info.get("transparency")
    if depth.greys is not None:
        black, white = depth.greys
        values = np.asarray(image)
        alpha = fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if type(key) is int else None
        steps = np.arange(white - black + 1) * 255 // (white - black)
        table = (steps[::-1] if depth.negative else steps).astype(np.uint8)
        return fromarray(table[np.clip(values, black, white) - black]), alpha
    if mode in ("P", "PA"):
        # A copy: Pillow writes the transparency into the palette of what it converts.
        copy = image.copy()
        if isinstance(key, bytes) and mode == "P":
            copy.info["transparency"] = key[:256]
        elif mode == "PA" or type(key) is not int or not 0 <= key <= 255:
            copy.info.pop("transparency", None)
        image = copy.convert("RGBA")
    elif mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[mode])
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    if image.mode == "1":
        image = image.convert("L")
        key = 255 * bool(key) if isinstance(key, int) else key
    elif image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("RGB")
    return image, _keyed_alpha(image, key, depth)


def _keyed_alpha(image: Image, key: Any, depth: Depth) -> Image | None:
    """Alpha of a picture one colour of which is transparent."""
    from PIL.Image import fromarray

    wanted = key if isinstance(key, tuple) else (key,)
    if len(wanted) != {"L": 1, "RGB": 3}.get(image.mode):
        return None
    if not all(isinstance(value, int) and 0 <= value <= 65535 for value in wanted):
        return None
    if max(wanted) > 255 and image.mode == "RGB":
        factor, divisor = _KEY_SCALES["RGB;16B"]  # loaded by others: the depth shows in the values
    else:
        factor, divisor = _KEY_SCALES.get(depth.raw_mode, (1, 1))
    hidden = np.ones((image.height, image.width), bool)
    for band, value in zip(image.split(), wanted, strict=True):
        hidden &= np.asarray(band) == value * factor // divisor
    return fromarray(np.where(hidden, 0, 255).astype(np.uint8))


def _in_srgb(image: Image, profile: object, name: str) -> Image:
    """L, RGB, CMYK or LAB as RGB, converted by the profile if that is one of this kind of picture."""
    kind = _PROFILES.get(image.mode)
    if kind is not None and isinstance(profile, bytes) and profile:
        from PIL import ImageCms

        try:
            if len(profile) > _MAX_PROFILE:
                raise InputError(f"expected at most {_MAX_PROFILE} bytes, got {len(profile)}")
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            found = source.profile.xcolor_space.strip()
            if found != kind:
                raise InputError(f"expected one for {kind} pictures, got one for {found}")
            transform = ImageCms.buildTransform(
                source,
                ImageCms.createProfile("sRGB"),
                image.mode,
                "RGB",
                ImageCms.Intent.RELATIVE_COLORIMETRIC,
                ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            probe = _probe(image.mode)
            before, after = (np.asarray(p, np.int16) for p in (probe.convert("RGB"), transform.apply(probe)))
            if np.abs(after - before).max() > 1:
                converted = transform.apply(image)
                title = (source.profile.profile_description or kind).strip()
                log.info("%s: colours converted to sRGB from %s", name, title)
                return converted
        except MemoryError:
            raise
        except Exception as error:  # a damaged profile: PyCMSError, OSError and others
            log.warning("%s: its colour profile is ignored: %s", name, error)
    return image if image.mode == "RGB" else image.convert("RGB")


@cache
def _probe(mode: str) -> Image:
    """A picture of colours that lie evenly in the whole range of a mode."""
    from PIL.Image import frombytes

    bands, steps = {"L": (1, 256), "RGB": (3, 9), "CMYK": (4, 5)}[mode]
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, steps)] * bands), axis=-1).round().astype(np.uint8)
    return frombytes(mode, (steps ** (bands - 1), steps), grid.tobytes())


def _orientation(image: Image, name: str) -> int:
    """1 to 8 as EXIF data, a TIFF tag or XMP say. Only that tag is read: others of a good picture may be damaged."""
    from PIL.Image import Exif

    raw = image.info.get("exif")
    try:
        value = image.getexif().get(_ORIENTATION)
        if value is None and isinstance(raw, bytes):
            own = Exif()
            own.load(raw)
            # Where Pillow stops at a damaged tag before it; not where the caller has removed it.
            value = None if _ORIENTATION in own else _stored_orientation(raw)
    except MemoryError:
        raise
    except Exception as error:
        value = _stored_orientation(raw) if isinstance(raw, bytes) else None
        if value is None:
            log.warning("%s: its EXIF data is damaged, the picture is taken as stored: %s", name, error)
    return _as_orientation(value)


def _as_orientation(value: Any) -> int:
    if isinstance(value, bytes):
        value = value.strip(b"\0")
        value = value[0] if len(value) == 1 else None
    if isinstance(value, str):
        value = value.strip(" \0")
        value = int(value) if len(value) == 1 and value.isdecimal() else None
    return next((known for known in range(2, 9) if value == known), 1)


def _stored_orientation(exif: bytes) -> int | None:
    """The tag by its place in the first directory, whatever else is in there."""
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, at)
        for number in range(count):
            tag, kind = struct.unpack_from(order + "HH", exif, at + 2 + 12 * number)
            if tag == _ORIENTATION and kind in (1, 3, 4):
                form = order + {1: "B", 3: "H", 4: "I"}[kind]
                value: int = struct.unpack_from(form, exif, at + 2 + 12 * number + 8)[0]
                return value
    except struct.error:
        pass
    return None


def _turned(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    methods = (
        Transpose.FLIP_LEFT_RIGHT,
        Transpose.ROTATE_180,
        Transpose.FLIP_TOP_BOTTOM,
        Transpose.TRANSPOSE,
        Transpose.ROTATE_270,
        Transpose.TRANSVERSE,
        Transpose.ROTATE_90,
    )
    return image.transpose(methods[orientation - 2])
