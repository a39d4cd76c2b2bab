"""Encoded image bytes to RGB pixels."""

import io
from collections.abc import Callable

import numpy as np
import PIL
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards.errors import PatchmillError
from shards.header import MOST_PIXELS
from shards.jpegcrop import decode_part
from shards.orientation import read_orientation

DECODER = f"simplejpeg {simplejpeg.__version__}, pillow {PIL.__version__}"
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


class DecodeError(PatchmillError):
    """The bytes are not an image that can be decoded whole: the content is bad, not the way to it."""


def decode(data: bytes, key: str, box: Callable[[int, int], Box] | None = None) -> np.ndarray:
    """Decode an image or a part of it, upright, transparency on white, 16 bits cut to 8.

    JPEG goes through libjpeg-turbo; everything else, and whatever libjpeg warns about, through Pillow, which
    passes over stray bytes but not over a file that ends early. Of a plain JPEG only the part is decoded.

    Args:
        data: An encoded image: JPEG, PNG, WebP or what else Pillow reads.
        key: Its name, for the error.
        box: Chooses the part from the image's height and width; without it, the whole image.

    Returns:
        uint8 [height, width, 3], RGB, of the image or the part.

    Raises:
        DecodeError: The content is damaged, or has more than 179 million pixels.
    """
    image = _decode_jpeg(data, box)
    return _part(_decode_any(data, key), box) if image is None else image


def decode_shrunk(data: bytes, key: str, short: int) -> np.ndarray:
    """Decode an image, at 1/2, 1/4 or 1/8 of its size if it is a JPEG whose short side is still ``short`` pixels then.

    These are the scales that libjpeg-turbo has fast code for. As ``decode`` otherwise.

    Returns:
        uint8 [height, width, 3], RGB, upright.

    Raises:
        DecodeError: As ``decode`` does.
    """
    image = _decode_jpeg(data, None, short)
    return _decode_any(data, key) if image is None else image


def _decode_jpeg(data: bytes, box: Callable[[int, int], Box] | None, short: int = 0) -> np.ndarray | None:
    """Decode a plain JPEG, upright; None where Pillow has to look."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    turn = _UPRIGHT.get(read_orientation(data))
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("CMYK", "YCCK") or height * width > MOST_PIXELS:
            return None
        if box and not turn and (part := decode_part(data, *box(height, width))) is not None:
            return part
        factor = next((factor for factor in (8, 4, 2) if short and min(height, width) >= short * factor), 1)
        least = (0, 0) if factor == 1 else (-(-height // factor), -(-width // factor))
        image = simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    except ValueError:
        return None
    return _part(np.ascontiguousarray(turn(image)) if turn else image, box)


def _part(image: np.ndarray, box: Callable[[int, int], Box] | None) -> np.ndarray:
    if box is None:
        return image
    top, left, height, width = box(*image.shape[:2])
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
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8
            grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
            return np.repeat(grey[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))
