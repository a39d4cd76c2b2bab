"""Images of any size to squares: pure functions of pixels and a key, so the same bits on any rank and thread.

Every resize is bilinear without antialiasing, also where it shrinks and also in evaluation: so the paper's
code trains and tests (TensorFlow's resize), and a model sees the sharpness it was trained on. It is OpenCV's
INTER_LINEAR, which is a fifth of the cost of an area average.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import sqrt
from typing import Protocol

import cv2
import numpy as np

from shards.decode import Box, decode
from shards.hashing import hash_int
from shards.resize import resize

RESIZER = f"opencv {cv2.__version__}"
"""What resizes: part of a run's state."""

Key = tuple[int, int, int]
"""Seed, epoch and global position of a sample: what its random numbers are made of."""


class Transform(Protocol):
    """What a loader does with each image: one of this file's, ``RandAugment``, or anything of yours that has this.

    Several threads call it at once. Batches are the same on any number of ranks and threads if it depends on pixels
    and key alone: ``draws(key, purpose)`` gives random numbers, with a ``purpose`` from 100 on its very own.
    """

    @property
    def size(self) -> int:
        """Side of the result, pixels."""

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3], RGB, which it may change, to uint8 [size, size, 3]."""


cv2.setNumThreads(1)  # images are transformed in parallel already; OpenCV's own threads would only contend

_AUGMENT = 4  # what a hash is for, its first word; shards/hashing.py lists all
_TRIES = 100
_LONGEST = 100


def draws(key: Key, purpose: int = _AUGMENT) -> Iterator[float]:
    """Yield a sample's random numbers in [0, 1): a hash of (purpose, seed, epoch, position, number of the draw)."""
    prefix = hash_int(purpose, *key)
    for number in count():
        yield (hash_int(prefix, number) >> 11) * 2.0**-53


def inception_box(
    height: int,
    width: int,
    draw: Iterator[float],
    area: tuple[float, float] = (0.05, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw a crop by the law of TensorFlow's ``sample_distorted_bounding_box``, which the paper's code used.

    The aspect ratio (width / height) is uniform; then the height is uniform among those that keep the share
    of the area and fit the image; then the place is uniform. After 100 tries without a fit, the whole image.

    Args:
        height: Of the image, pixels.
        width: Of the image, pixels.
        draw: Uniform random numbers in [0, 1).
        area: Least and greatest share of the image's area.
        aspect: Least and greatest aspect ratio.

    Returns:
        top, left, height and width of the crop, pixels.
    """
    least, most = area[0] * height * width, area[1] * height * width
    for _ in range(_TRIES):
        ratio = aspect[0] + (aspect[1] - aspect[0]) * next(draw)
        low = round(sqrt(least / ratio))
        high = min(round(sqrt(most / ratio)), height, int((width + 0.5) / ratio))
        h = min(low, high) + int(next(draw) * (max(high - low, 0) + 1))
        w = min(round(h * ratio), width)
        if h > 0 and w > 0 and least <= h * w <= most:
            return int(next(draw) * (height - h + 1)), int(next(draw) * (width - w + 1)), h, w
    return 0, 0, height, width


@dataclass(frozen=True)
class InceptionCrop:
    """A random part of the image, resized to a square, half the time mirrored: for pre-training.

    Attributes:
        size: Side of the result, pixels.
        area: Least and greatest share of the image's area.
        aspect: Least and greatest aspect ratio, width / height.
        shrink: Decode a JPEG at 1/2, 1/4 or 1/8 where the part still is as large as the result then: quicker for large
            images, and antialiased, which the paper's code is not. The pixels of decoded images do not change.
        mirror: Mirror it left to right half the time; False: never.
    """

    size: int
    area: tuple[float, float] = (0.05, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    shrink: bool = False
    mirror: bool = True

    def box(self, height: int, width: int, key: Key) -> Box:
        """Choose the part of an image of this height and width."""
        draw = draws(key)
        next(draw)  # the mirror's: first, since the box takes any number
        return inception_box(height, width, draw, self.area, self.aspect)

    def finish(self, part: np.ndarray, key: Key) -> np.ndarray:
        """Make the result from the part: uint8 [h, w, 3] to uint8 [size, size, 3]."""
        return resize(part, self.size, self.size, mirror=self.mirror and next(draws(key)) < 0.5)

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3] to uint8 [size, size, 3]."""
        top, left, h, w = self.box(image.shape[0], image.shape[1], key)
        return self.finish(image[top : top + h, left : left + w], key)


@dataclass(frozen=True)
class Resize:
    """The whole image, straight to a square of side ``size``: for evaluation."""

    size: int

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3] to uint8 [size, size, 3]; ``key`` is not used."""
        return resize(image, self.size, self.size)


@dataclass(frozen=True)
class ResizeCrop:
    """The whole image to a larger square, a random part of it, half the time mirrored: for fine-tuning.

    Attributes:
        size: Side of the result, pixels.
        larger: Side of the square it is cut from, pixels; by default 7/6 of it, as 448 is of 384.
        mirror: Mirror it left to right half the time; False: never.
    """

    size: int
    larger: int | None = None
    mirror: bool = True

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3] to uint8 [size, size, 3]."""
        draw = draws(key)
        larger = self.larger or round(self.size * 7 / 6)
        top, left = (int(next(draw) * (larger - self.size + 1)) for _ in range(2))
        crop = resize(image, larger, larger)[top : top + self.size, left : left + self.size]
        return cv2.flip(crop, 1) if self.mirror and next(draw) < 0.5 else crop  # a twentieth of crop[:, ::-1].copy()


@dataclass(frozen=True)
class CenterCrop:
    """The image with its short side resized, then the middle of it: for evaluation of other people's models.

    Attributes:
        size: Side of the result, pixels.
        short: Short side before the crop, pixels; by default 8/7 of it, as 256 is of 224.
    """

    size: int
    short: int | None = None

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3] to uint8 [size, size, 3]; ``key`` is not used."""
        short = self.short or round(self.size * 8 / 7)
        image = _not_too_long(image)
        h, w = image.shape[:2]
        scale = short / min(h, w)
        return _middle(resize(image, max(short, round(h * scale)), max(short, round(w * scale))), self.size)


@dataclass(frozen=True)
class ResizeCenterCrop:
    """The whole image to a larger square, then the middle of it: for few-shot evaluation, as big_vision does it.

    Attributes:
        size: Side of the result, pixels; the square is 8/7 of it, as 256 is of 224.
    """

    size: int

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3] to uint8 [size, size, 3]; ``key`` is not used."""
        larger = round(self.size * 8 / 7)
        return _middle(resize(image, larger, larger), self.size)


def _middle(image: np.ndarray, size: int) -> np.ndarray:
    """Return the central square; of a margin that is odd, the smaller part is above and on the left."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _not_too_long(image: np.ndarray) -> np.ndarray:
    """Return the middle of an image of 100 times its short side: a line of pixels would be resized to gigabytes."""
    most = _LONGEST * min(image.shape[:2])
    top, left = (max(0, side - most) // 2 for side in image.shape[:2])
    return image[top : top + most, left : left + most]


TRANSFORMS: dict[str, Callable[[int], Transform]] = {
    "inception": InceptionCrop,
    "resize": Resize,
    "resize_crop": ResizeCrop,
    "center_crop": CenterCrop,
    "resize_center_crop": ResizeCenterCrop,
}
"""Transforms by the name that settings give them, made from the side of their result."""


def transform_encoded(transform: Transform, data: bytes, name: str, key: Key) -> np.ndarray:
    """Return ``transform(decode(data, name), key)``, decoding only the part that is needed if possible.

    Args:
        transform: If it has both ``box`` and ``finish``, as ``InceptionCrop`` has, they are used instead, on a
            smaller image if it has ``shrink``.
        data: An encoded image.
        name: Of the image, for the error.
        key: Seed, epoch and position.

    Raises:
        DecodeError: The content is damaged.
    """
    if hasattr(transform, "box") and hasattr(transform, "finish"):
        short = transform.size if getattr(transform, "shrink", False) else 0
        return transform.finish(decode(data, name, partial(transform.box, key=key), short), key)
    return transform(decode(data, name, _whole), key)  # as a part, which the native decoder is asked for


def _whole(height: int, width: int) -> Box:
    return 0, 0, height, width
