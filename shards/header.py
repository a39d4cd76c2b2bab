"""What the header of an encoded image says, and whether its file is whole, without decoding it."""

import io
import struct
from typing import NamedTuple

from PIL import Image

FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: the JPEG of some cameras


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
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            header = Header(FORMATS[image.format], *image.size, _orientation(image))
            if header.format == "png":
                image.verify()
    except Image.UnidentifiedImageError as error:
        raise BrokenImageError("not a jpg, png or webp image") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise BrokenImageError(str(error)) from error
    if header.format == "jpg" and not _jpeg_ends(data):
        raise BrokenImageError("cut short: no end marker")
    if header.format == "webp" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BrokenImageError("cut short: fewer bytes than its header claims")
    return header


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info:
        return 1
    try:
        orientation = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):  # broken EXIF breaks no image
        return 1
    return orientation if orientation in range(1, 9) else 1


def _jpeg_ends(data: bytes) -> bool:
    """Tell whether there is an end marker after the first scan starts (a thumbnail before it has its own)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xFF:  # padding
            at += 1
        elif data[at + 1] == 0xDA:  # start of scan: compressed data never holds an end marker by chance
            return data.rfind(b"\xff\xd9", at) > 0
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False
