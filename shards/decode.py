"""Encoded image bytes to RGB pixels."""

import io
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

from shards.errors import PatchmillError
from shards.header import MOST_PIXELS
from shards.jpegcrop import decode_part, native, simplejpeg
from shards.orientation import read_orientation

if simplejpeg:
    JPEG = f"simplejpeg {simplejpeg.__version__}"
else:
    JPEG = f"Pillow's libjpeg {features.version('libjpeg_turbo') or features.version('jpg')}"
DECODER = f"{JPEG}, pillow {PIL.__version__}"
"""What made the pixels: part of a run's state. The crop decoder makes the same ones and is not named."""

Box = tuple[int, int, int, int]
"""Top, left, height and width of a part of an image, pixels."""

# What to do with an array stored in each EXIF orientation (EXIF 2.32, table 6).
_UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
}


_DENSEST = 9000  # pixels that a byte can stand for: deflate makes 1032 of one at most, of 8 pixels each
_BAND = 1 << 24  # pixels that are made RGB at once


class DecodeError(PatchmillError):
    """The bytes are not an image that can be decoded whole: the content is bad, not the way to it."""


def decode(data: bytes, key: str, box: Callable[[int, int], Box] | None = None, short: int = 0) -> np.ndarray:
    """Decode an image or a part of it, upright, transparency on white, 16 bits cut to 8.

    JPEG goes through libjpeg-turbo; everything else, and whatever libjpeg warns about, through Pillow, which
    passes over stray bytes but not over a file that ends early. Of a plain JPEG only the part is decoded.
    Without simplejpeg, which is said once on stderr, Pillow decodes JPEGs too: whole, and ``short`` does nothing.

    Args:
        data: An encoded image: JPEG, PNG, WebP or what else Pillow reads.
        key: Its name, for the error.
        box: Chooses the part from the image's height and width; without it, the whole image.
        short: Unless 0, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the part's short side still is this many
            pixels then, 8 at least. These are the fractions that libjpeg-turbo has fast code for. The part's edges
            go to the nearest pixels.

    Returns:
        uint8 [height, width, 3], RGB, of the image or the part.

    Raises:
        DecodeError: The content is damaged, or has more than 179 million pixels.
    """
    image = _decode_jpeg(data, box, short)
    if image is not None:
        return image
    image = _decode_any(data, key)
    return _cut(image, box(*image.shape[:2])) if box else image


def _decode_jpeg(data: bytes, box: Callable[[int, int], Box] | None, short: int) -> np.ndarray | None:
    """Decode a plain JPEG, upright; None where Pillow has to look."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    if simplejpeg is None:
        native()  # says so
        return None
    orientation = read_orientation(data)
    turn = _UPRIGHT.get(orientation)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK") or height * width > MOST_PIXELS:
            return None
        upright = (width, height) if turn and orientation >= 5 else (height, width)
        asked: Box = box(*upright) if box else (0, 0, upright[0], upright[1])
        # Of images of a few pixels, simplejpeg would take another fraction than asked for.
        shrink = next((n for n in (8, 4, 2) if short and min(asked[2:]) >= max(short, 8) * n), 1)
        part = _shrunk(asked, shrink) if box else None
        if part and not turn and (image := decode_part(data, *part, shrink=shrink)) is not None:
            return image
        least = (0, 0) if shrink == 1 else (-(-height // shrink), -(-width // shrink))
        image = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return None
    image = np.ascontiguousarray(turn(image)) if turn else image
    return _cut(image, part) if part else image


def _shrunk(part: Box, shrink: int) -> Box:
    top, left, bottom, right = part[0], part[1], part[0] + part[2], part[1] + part[3]
    top, left, bottom, right = ((edge + shrink // 2) // shrink for edge in (top, left, bottom, right))
    return top, left, bottom - top, right - left


def _cut(image: np.ndarray, part: Box) -> np.ndarray:
    top, left, height, width = part
    return image[top : top + height, left : left + width]


def _decode_any(data: bytes, key: str) -> np.ndarray:
    """Decode what Pillow reads, upright."""
    try:
        image = _decode_stored(data)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001, damaged images make Pillow raise anything
        cause = ValueError("no known image format") if isinstance(error, UnidentifiedImageError) else error
        raise DecodeError(f"cannot decode {key}: {cause}; drop the sample from the data set") from cause
    turn = _UPRIGHT.get(read_orientation(data))
    return np.ascontiguousarray(turn(image)) if turn else image


def _decode_stored(data: bytes) -> np.ndarray:
    """Decode what Pillow reads, as it is stored."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        if image.format in ("PNG", "JPEG") and width * height > _DENSEST * len(data):
            raise ValueError(f"{width} x {height} pixels are more than {len(data)} bytes can hold")
        image.load()
        rows = max(1, _BAND // width)
        if height <= rows:
            return _rgb(image)
        out = np.empty((height, width, 3), dtype=np.uint8)
        for top in range(0, height, rows):  # band by band: each step below takes the memory of another image
            bottom = min(height, top + rows)
            out[top:bottom] = _rgb(image.crop((0, top, width, bottom)))
        return out


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))
