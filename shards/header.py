"""What the header of an encoded image says, and whether its file is whole, without decoding it."""

import io
import struct
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from shards.orientation import SCAN, jpeg_segments, read_orientation

MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # where Pillow refuses; from half of that on, it warns
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # of odd metadata, without the image's name


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
            header = Header((image.format or "").lower(), *image.size, read_orientation(data))
            if header.format == "png":
                image.verify()
    except UnidentifiedImageError as error:
        raise BrokenImageError("not a jpg, png or webp image") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged images make Pillow raise anything
        raise BrokenImageError(str(error) or type(error).__name__) from error
    return header


def _read_jpeg(data: bytes) -> Header:
    """Walk the segments: Pillow does the same in ten times the time."""
    size = None
    for marker, start, end in jpeg_segments(data):
        if marker == SCAN:  # compressed data never holds an end marker by chance
            if size is None:
                raise BrokenImageError("no frame header before the first scan")
            if data.rfind(b"\xff\xd9", start) < 0:  # a thumbnail before it has its own
                raise BrokenImageError("cut short: no end marker")
            return Header("jpg", size[1], size[0], read_orientation(data))
        if marker in _FRAMES and end - start >= 6:
            bits, height, width, components = struct.unpack_from(">BHHB", data, start)
            size = height, width
            _check_frame(height, width, bits, components)
    raise BrokenImageError("cut short or damaged: no scan after the header")


_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # the markers of frame headers


def _check_frame(height: int, width: int, bits: int, components: int) -> None:
    if not (height and width):
        raise BrokenImageError(f"an image of {width} x {height} pixels")
    if bits != 8 or components not in (1, 3, 4):
        raise BrokenImageError(f"a JPEG of {components} components of {bits} bits, which nothing here decodes")
    if height * width > MOST_PIXELS:
        raise BrokenImageError(f"{height * width:,} pixels, more than {MOST_PIXELS:,}: a decompression bomb?")
