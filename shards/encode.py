"""Images made anew for the shards: turned upright, shrunk, compressed. Without it, a build keeps the original bytes."""

import io
from dataclasses import dataclass

import cv2
import numpy as np
import PIL
from PIL import Image

from shards.decode import JPEG, decode
from shards.header import BrokenImageError, Header
from shards.jpegcrop import simplejpeg

cv2.setNumThreads(1)  # shards are written in parallel already

FORMATS = ("jpg", "png", "webp")
QUALITY = 90
_LONGEST = {"jpg": 65_500, "png": 1 << 31, "webp": 16_383}  # sides that the encoders take, pixels
ENCODER = f"{JPEG}, opencv {cv2.__version__}, pillow {PIL.__version__}"
"""What made the bytes: another version may make others, so a build does not mix two."""


@dataclass(frozen=True)
class Encoding:
    """How images are made anew.

    Attributes:
        resize_short: Shrink images whose short side is longer to this, pixels; smaller ones keep their size. If nothing
            else is asked for, they keep their bytes, too.
        format: jpg, png or webp; None keeps each image's own.
        quality: Of jpg and webp, 1 to 100; None is 90.
    """

    resize_short: int | None = None
    format: str | None = None
    quality: int | None = None

    def apply(self, data: bytes, header: Header, key: str, border: int = 0) -> tuple[bytes, Header] | None:
        """Return the image encoded anew, upright and without EXIF; None if its bytes are to stay as they are.

        A JPEG is decoded at 1/2, 1/4 or 1/8 where that is still as large as asked for. What is left to shrink is
        blurred against aliasing, then interpolated; from a factor of 2 on, areas are averaged.

        Args:
            data: The image.
            header: Of it.
            key: Of it, for errors.
            border: Pixels to cut off at each edge, first.

        Raises:
            DecodeError: The image is damaged.
            BrokenImageError: It is too large for the format, or nothing but border.
        """
        short, long = (side - 2 * border for side in sorted((header.width, header.height)))
        if short <= 0:
            raise BrokenImageError(f"{header.width} x {header.height} pixels are nothing but a border of {border}")
        target = self.resize_short if self.resize_short is not None and short > self.resize_short else 0
        if not target and not border and self.format in (None, header.format) and self.quality is None:
            return None
        image = decode(data, key, short=target if not border else 0)
        if border:
            image = image[border:-border, border:-border]
        if target:
            long = max(1, round(long * target / short))
            wide = image.shape[1] >= image.shape[0]  # after turning it upright
            size = (long, target) if wide else (target, long)
            image = _shrink(image, size)
        format = self.format or header.format
        anew = _encode(np.ascontiguousarray(image), format, self.quality or QUALITY)
        return anew, Header(format, image.shape[1], image.shape[0])


def _shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shrink uint8 [height, width, 3] to ``size``, width and height.

    Below a factor of 2, a Gaussian of sigma 0.6 (factor - 1) and bilinear interpolation come closer to Lanczos than
    Pillow's bilinear filter does, in a quarter of the time of OpenCV's area interpolation.
    """
    factor = min(image.shape[:2]) / min(size)
    if factor >= 2:
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if factor > 1.5:  # below, the weights of the neighbours are under 0.4 %
        image = cv2.GaussianBlur(image, (3, 3), 0.6 * (factor - 1))
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def _encode(image: np.ndarray, format: str, quality: int) -> bytes:
    """Encode uint8 [height, width, 3] RGB."""
    if max(image.shape) > _LONGEST[format]:
        size = f"{image.shape[1]} x {image.shape[0]}"
        raise BrokenImageError(f"{size} pixels are too many for {format}, which ends at {_LONGEST[format]} a side")
    if format == "jpg" and simplejpeg:
        return simplejpeg.encode_jpeg(image, quality, "RGB", "420")
    file = io.BytesIO()
    if format == "png":
        Image.fromarray(image).save(file, "PNG")
    elif format == "jpg":
        Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    else:
        Image.fromarray(image).save(file, "WEBP", quality=quality)
    return file.getvalue()
