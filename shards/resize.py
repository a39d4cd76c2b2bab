"""OpenCV's bilinear resize, without antialiasing, by native/resize.c: the same bits in less time."""

from functools import cache

import cv2
import numpy as np

from shards.errors import UserError
from shards.jpegcrop import Native, native


def resize(image: np.ndarray, height: int, width: int, mirror: bool = False) -> np.ndarray:
    """Resize uint8 [h, w, 3] to uint8 [height, width, 3], a new array; ``mirror`` it left to right, or not.

    Raises:
        UserError: One of the two has no pixels.
    """
    if min(*image.shape[:2], height, width) < 1:
        size = f"{image.shape[1]} x {image.shape[0]} pixels cannot become one of {width} x {height}"
        raise UserError(f"an image of {size}; choose parts and sizes of a pixel at least")
    library = native()
    if library and _is_opencv(library) and (result := _natively(library, image, height, width, mirror)) is not None:
        return result
    return _by_opencv(image, height, width, mirror)


def _by_opencv(image: np.ndarray, height: int, width: int, mirror: bool) -> np.ndarray:
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(image, 1) if mirror else image


def _natively(library: Native, image: np.ndarray, height: int, width: int, mirror: bool) -> np.ndarray | None:
    if image.strides[1:] != (3, 1) or image.strides[0] < 3 * image.shape[1]:
        image = np.ascontiguousarray(image)
    out = np.empty((height, width, 3), dtype=np.uint8)
    source = image.ctypes.data, image.strides[0], *image.shape[:2]
    return None if library.resize(*source, height, width, mirror, out.ctypes.data) else out


@cache
def _is_opencv(library: Native) -> bool:
    """Tell whether the library makes the pixels of the OpenCV that is installed: another version may make others."""
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    sizes = [(224, 224), (40, 30), (61, 83), (7, 200), (1, 1)]
    return all(
        (ours := _natively(library, image, *size, mirror=True)) is not None
        and np.array_equal(ours, _by_opencv(image, *size, mirror=True))
        for size in sizes
    )
