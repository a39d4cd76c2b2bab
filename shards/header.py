"""What the header of an encoded image says, and whether its file is whole, without decoding it."""

import io
import struct
import warnings
from typing import NamedTuple

from PIL import Image

MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow refuses; from half of that on, it warns
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class BrokenImageError(ValueError):
    """The bytes are no whole image; the message is the reason."""


class Header(NamedTuple):
    """The true format (jpg, png or webp, whatever the file is called), the stored size, the EXIF orientation.

    Attributes:
        format: jpg, png or webp.
        width: Of the stored image, pixels.
        height: Likewise.
        orientation: 1 (upright, or nothing said) to 8, as in EXIF 2.32, table 6.
    """

    format: str
    width: int
    height: int
    orientation: int = 1


def read_header(data: bytes) -> Header:
    """Read the header of an image and check that its file is whole.

    A JPEG must reach its end marker, a PNG must have all its chunks with right checksums, a WebP the length
    it claims. Damage inside compressed JPEG or WebP data shows only when it is decoded.

    Raises:
        BrokenImageError: The bytes are not a whole jpg, png or webp image.
    """
    if not data:
        raise BrokenImageError("empty file")
    if data[:3] == b"\xff\xd8\xff":
        return _read_jpeg(data)
    if data[:4] == b"RIFF" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BrokenImageError("cut short: fewer bytes than its header claims")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP")) as image:
            header = Header(image.format.lower(), *image.size, _orientation(image.info.get("exif", b"")))
            if header.format == "png":
                image.verify()
    except Image.UnidentifiedImageError as error:
        raise BrokenImageError("not a jpg, png or webp image") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BrokenImageError(str(error)) from error
    return header


def _read_jpeg(data: bytes) -> Header:
    """Walk the segments of a JPEG (ITU-T T.81, annex B): Pillow does the same in ten times the time."""
    size, orientation, at = None, 1, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:  # start of scan: compressed data never holds an end marker by chance
            if size is None:
                raise BrokenImageError("no frame header before the first scan")
            if data.rfind(b"\xff\xd9", at) < 0:  # a thumbnail before it has its own
                raise BrokenImageError("cut short: no end marker")
            return Header("jpg", size[1], size[0], orientation)
        segment = data[at + 4 : at + 2 + length]
        if marker in _FRAMES and len(segment) >= 6:
            size = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
            _check_frame(*size, segment[0], segment[5])
        elif marker == 0xE1 and segment[:6] == b"Exif\x00\x00":
            orientation = _orientation(segment)
        at += 2 + length
    raise BrokenImageError("cut short or damaged: no scan after the header")


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers of frame headers


def _check_frame(height: int, width: int, bits: int, components: int) -> None:
    if not (height and width):
        raise BrokenImageError(f"an image of {width} x {height} pixels")
    if bits != 8 or components not in (1, 3, 4):
        raise BrokenImageError(f"a JPEG of {components} components of {bits} bits, which nothing here decodes")
    if height * width > MOST_PIXELS:
        raise BrokenImageError(f"{height * width:,} pixels, more than {MOST_PIXELS:,}: a decompression bomb?")


def _orientation(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif)
        orientation = tags.get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):  # broken EXIF breaks no image
        return 1
    return orientation if orientation in range(1, 9) else 1
