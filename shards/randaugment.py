"""AugReg's RandAugment: a few random operations on an image, a pure function of pixels and a key.

"How to train your ViT?" (arXiv:2106.10270, section 3.4) and the ViT baselines after it use the RandAugment of the
AutoAugment authors' TensorFlow code: 16 operations, constants in pixels, one magnitude for all. This is its law, with
what is peculiar to it, since published models were trained so:

* geometric operations take the nearest pixel, and grey 128 where there is none;
* ``Contrast`` blends with the grey h·w / 256 (at most 255), not with the mean of the image;
* the threshold of ``Solarize`` lives in a byte, so magnitudes 0, 10 and 20 invert the whole image;
* ``Posterize`` keeps at least one bit.

Point operations are tables, the rest OpenCV's. Pixels differ from the original's only where the last bit of its
float32 arithmetic decides: by one level, before they are blended, in ``Color`` and ``Sharpness``; and by a neighbour's
where a geometric operation lands half-way between two.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import cos, pi, sin

import cv2
import numpy as np

from shards.augment import InceptionCrop, Key, draws
from shards.decode import Box
from shards.errors import UserError

_RANDAUGMENT = 5  # first word of its hashes; shards/hashing.py lists all
_GREY = 128
_LEVELS = np.arange(256)
_HALVES_GO_UP = np.array([[0, 0, 1e-4], [0, 0, 1e-4]])  # as in the original, whatever OpenCV's arithmetic
_ENDS_WITH = 20  # the original has no Posterize for more

_Operation = Callable[[np.ndarray, float, Iterator[float]], np.ndarray]


def rand_augment(image: np.ndarray, key: Key, layers: int, magnitude: int) -> np.ndarray:
    """Apply ``layers`` operations, each drawn uniformly from ``OPERATIONS``.

    Args:
        image: uint8 [h, w, 3], RGB.
        key: Seed, epoch and position.
        layers: Operations to apply, one after the other.
        magnitude: Of all of them, 0 to 20; 0 does not mean none.

    Returns:
        uint8 [h, w, 3].
    """
    draw = draws(key, _RANDAUGMENT)
    operations = list(OPERATIONS.values())
    for _ in range(layers):
        operation = operations[int(next(draw) * len(operations))]
        image = operation(image, magnitude / 10, draw)
    return image


@dataclass(frozen=True)
class RandAugment:
    """A crop, mirrored half the time, and then a few random operations: for pre-training.

    Attributes:
        crop: Makes the square.
        layers: Operations to apply.
        magnitude: Of all of them, 0 to 20.

    Raises:
        UserError: The magnitude is another.
    """

    crop: InceptionCrop
    layers: int
    magnitude: int

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= _ENDS_WITH:
            raise UserError(f"RandAugment's magnitude is {self.magnitude}; give one from 0 to {_ENDS_WITH}")

    @property
    def size(self) -> int:
        """Side of the result, pixels."""
        return self.crop.size

    @property
    def shrink(self) -> bool:
        """Whether the crop's part may be decoded at a fraction of its size."""
        return self.crop.shrink

    def box(self, height: int, width: int, key: Key) -> Box:
        """Choose the part of an image of this height and width."""
        return self.crop.box(height, width, key)

    def finish(self, part: np.ndarray, key: Key) -> np.ndarray:
        """Make the result from the part: uint8 [h, w, 3] to uint8 [size, size, 3]."""
        return rand_augment(self.crop.finish(part, key), key, self.layers, self.magnitude)

    def __call__(self, image: np.ndarray, key: Key) -> np.ndarray:
        """Transform uint8 [h, w, 3] to uint8 [size, size, 3]."""
        return rand_augment(self.crop(image, key), key, self.layers, self.magnitude)


# ---- operations: image, magnitude / 10 and random numbers to image


def _autocontrast(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _by_channel(image, _stretched)


def _stretched(histogram: np.ndarray) -> np.ndarray:
    low, high = np.flatnonzero(histogram)[[0, -1]]
    if low == high:
        return _LEVELS
    scale = np.float32(255) / np.float32(high - low)
    return _LEVELS.astype(np.float32) * scale - np.float32(low) * scale


def _equalize(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _by_channel(image, _flattened)


def _flattened(histogram: np.ndarray) -> np.ndarray:
    step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
    below = np.cumsum(histogram) - histogram
    return (below + step // 2) // step if step else _LEVELS


def _by_channel(image: np.ndarray, table: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Map each channel through the table that its histogram, int64 [256], gives."""
    planes = []
    for plane in cv2.split(image):
        histogram = cv2.calcHist([plane], [0], None, [256], [0, 256]).ravel().astype(np.int64)
        planes.append(_mapped(plane, table(histogram)))
    return cv2.merge(planes)


def _mapped(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Map all values through a table of 256 numbers, cut to whole ones in [0, 255]."""
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8))


def _invert(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return cv2.bitwise_not(image)


def _posterize(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    shift = min(8 - int(level * 4), 7)
    return _mapped(image, _LEVELS >> shift << shift)


def _solarize(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    threshold = int(level * 256) % 256
    return _mapped(image, np.where(threshold > _LEVELS, _LEVELS, 255 - _LEVELS))


def _solarize_add(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _mapped(image, np.where(_LEVELS < 128, _LEVELS + int(level * 110), _LEVELS))


def _color(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    weights = np.array([[0.2989, 0.5870, 0.1140]]) * (255.5 / 255)
    grey = cv2.transform(image, np.append(weights, [[-0.499]], axis=1))  # OpenCV rounds, the original cuts
    return _blend(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), image, level)


def _contrast(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    grey = np.float32(min(image.shape[0] * image.shape[1] // 256, 255))
    return _mapped(image, grey + np.float32(_factor(level)) * (_LEVELS.astype(np.float32) - grey))


def _brightness(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _mapped(image, np.float32(_factor(level)) * _LEVELS.astype(np.float32))


def _sharpness(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = image.copy()  # its border stays
    smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, kernel, delta=-0.5 + 1 / 26)[1:-1, 1:-1]  # cut, as 13ths are
    return _blend(smooth, image, level)


def _factor(level: float) -> float:
    return level * 1.8 + 0.1


def _blend(image: np.ndarray, other: np.ndarray, level: float) -> np.ndarray:
    """Go from an image towards another, or past it, cut to whole numbers: a magnitude's factors are 50ths."""
    factor = _factor(level)
    return cv2.addWeighted(image, 1 - factor, other, factor, -0.49)


def _rotate(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    angle = _either_way(level * 30, draw) * pi / 180
    x, y = image.shape[1] - 1, image.shape[0] - 1
    c, s = cos(angle), sin(angle)
    return _moved(image, [[c, -s, (x - c * x + s * y) / 2], [s, c, (y - s * x - c * y) / 2]])


def _shear_x(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _moved(image, [[1, _either_way(level * 0.3, draw), 0], [0, 1, 0]])


def _shear_y(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _moved(image, [[1, 0, 0], [_either_way(level * 0.3, draw), 1, 0]])


def _translate_x(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _moved(image, [[1, 0, _either_way(level * 100, draw)], [0, 1, 0]])


def _translate_y(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    return _moved(image, [[1, 0, 0], [0, 1, _either_way(level * 100, draw)]])


def _either_way(amount: float, draw: Iterator[float]) -> float:
    return amount if next(draw) >= 0.5 else -amount


def _moved(image: np.ndarray, source: list[list[float]]) -> np.ndarray:
    """Take each pixel (x, y) from the nearest to the place ``source`` @ (x, y, 1)."""
    how = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, np.array(source) + _HALVES_GO_UP, size, flags=how, borderValue=[_GREY] * 3)


def _cutout(image: np.ndarray, level: float, draw: Iterator[float]) -> np.ndarray:
    half = int(level * 40)
    y, x = (int(next(draw) * side) for side in image.shape[:2])
    image = image.copy()
    image[max(0, y - half) : y + half, max(0, x - half) : x + half] = _GREY
    return image


OPERATIONS: dict[str, _Operation] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "Color": _color,
    "Contrast": _contrast,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Cutout": _cutout,
    "SolarizeAdd": _solarize_add,
}
