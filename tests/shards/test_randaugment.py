"""Pixels against TensorFlow's (by checksum) and Pillow's; the law of the draws."""

import pickle
import zlib
from math import cos, pi, sin

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from shards.augment import InceptionCrop, draws
from shards.augreg import PRESETS
from shards.errors import UserError
from shards.randaugment import OPERATIONS, RandAugment, rand_augment

MAGNITUDES = (0, 3, 10, 15, 20)
UP, DOWN = 0.9, 0.1  # the draw that leaves an amount positive, and the one that makes it negative


def picture(height=60, width=84):
    """Blocks and noise, each channel with a range of its own."""
    rng = np.random.default_rng(1)
    blocks = np.kron(rng.integers(0, 220, (-(-height // 8), -(-width // 12), 3)), np.ones((8, 12, 1), int))
    image = blocks[:height, :width] * np.array([8, 6, 10]) // 10 + np.array([20, 60, 0])
    return (image + rng.integers(0, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)


def apply(name, magnitude, draw=UP, image=None):
    return OPERATIONS[name](picture() if image is None else image, magnitude / 10, iter([draw] * 2))


# CRC-32 of what big_vision's autoaugment.py makes of the picture under TensorFlow 2.15.1, TensorFlow Addons 0.23.0 and
# NumPy 1.26.4, at each of the magnitudes. Not here: Color, Sharpness, and shears and turns at some magnitudes, where
# single pixels are decided by the last bit of a float32; Pillow is the judge of these, below.
TENSORFLOW = {
    ("AutoContrast", UP): "9d07a306 9d07a306 9d07a306 9d07a306 9d07a306",
    ("Equalize", UP): "0751ad68 0751ad68 0751ad68 0751ad68 0751ad68",
    ("Invert", UP): "52ab17a2 52ab17a2 52ab17a2 52ab17a2 52ab17a2",
    ("Rotate", UP): "008a9cac de772cfc 650b95d8 - cc64183a",
    ("Rotate", DOWN): "008a9cac 70cd189d e92a2b13 - a29ee9c5",
    ("Posterize", UP): "dec44dad dec44dad 3feeb50b 91fa0fc5 008a9cac",
    ("Solarize", UP): "52ab17a2 0c5537a5 52ab17a2 869896c1 52ab17a2",
    ("Contrast", UP): "1f37832f 5c0f76cb 165b0696 2dac2d06 ef5671bf",
    ("Brightness", UP): "9e77aec4 5acc21d1 3ea94916 a2e75a3d de097d26",
    ("ShearX", UP): "008a9cac c4c0e7ec 7d1a6729 70882af0 e465df43",
    ("ShearX", DOWN): "008a9cac - - - afd954ea",
    ("ShearY", UP): "008a9cac e71a4b0b 25fda6af 0e886482 107ac8e6",
    ("ShearY", DOWN): "008a9cac - - - 75ce738a",
    ("TranslateX", UP): "008a9cac 2988cd08 4f10a411 4f10a411 4f10a411",
    ("TranslateX", DOWN): "008a9cac ca0fd39e 4f10a411 4f10a411 4f10a411",
    ("TranslateY", UP): "008a9cac 7e67b11d 4f10a411 4f10a411 4f10a411",
    ("TranslateY", DOWN): "008a9cac 7fc58e93 4f10a411 4f10a411 4f10a411",
    ("SolarizeAdd", UP): "008a9cac 2cdfe942 d9f02340 bcda2a99 e876fd32",
}


@pytest.mark.parametrize(("name", "draw"), TENSORFLOW)
def test_pixels_are_tensorflows(name, draw):
    for magnitude, want in zip(MAGNITUDES, TENSORFLOW[name, draw].split(), strict=True):
        if want != "-":
            assert f"{zlib.crc32(apply(name, magnitude, draw).tobytes()):08x}" == want, magnitude


def factor(magnitude):
    return magnitude * 0.18 + 0.1


def inverted_below_byte(image, magnitude):
    return ImageOps.solarize(image, int(magnitude / 10 * 256) % 256)


def with_a_bit_at_least(image, magnitude):
    return ImageOps.posterize(image, max(int(magnitude / 10 * 4), 1))


def brightened_below_half(image, magnitude):
    return image.point(lambda v: min(v + int(magnitude / 10 * 110), 255) if v < 128 else v)


def from_grey(image, magnitude):
    grey = min(image.width * image.height // 256, 255)
    return Image.blend(Image.new("RGB", image.size, (grey,) * 3), image, factor(magnitude))


PILLOW = {
    # operation: (Pillow's, levels by which pixels may differ: 0 where it is the same arithmetic)
    "AutoContrast": (lambda image, m: ImageOps.autocontrast(image), lambda m: 1),  # float64, and float32 in the law
    "Equalize": (lambda image, m: ImageOps.equalize(image), lambda m: 0),
    "Invert": (lambda image, m: ImageOps.invert(image), lambda m: 0),
    "Posterize": (with_a_bit_at_least, lambda m: 0),
    "Solarize": (inverted_below_byte, lambda m: 0),
    "SolarizeAdd": (brightened_below_half, lambda m: 0),
    "Brightness": (lambda image, m: ImageEnhance.Brightness(image).enhance(factor(m)), lambda m: 0),
    "Contrast": (from_grey, lambda m: 0),
    # Pillow rounds what the law cuts, so grey and smooth differ by up to one level before they are blended.
    "Color": (lambda image, m: ImageEnhance.Color(image).enhance(factor(m)), lambda m: 1 + abs(1 - factor(m))),
    "Sharpness": (lambda image, m: ImageEnhance.Sharpness(image).enhance(factor(m)), lambda m: 1 + abs(1 - factor(m))),
}


@pytest.mark.parametrize("name", PILLOW)
@pytest.mark.parametrize("shape", [(60, 84), (224, 224), (3, 2), (1, 1)])
def test_pixels_are_pillows(name, shape):
    want, tolerance = PILLOW[name]
    image = picture(*shape)
    for magnitude in range(21):
        off = np.abs(apply(name, magnitude, image=image) - np.asarray(want(Image.fromarray(image), magnitude), int))
        assert off.max() <= tolerance(magnitude), magnitude


@pytest.mark.parametrize("level", [0, 7, 128, 255])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_a_plain_image_stays(name, level):
    image = np.full((9, 9, 3), level, dtype=np.uint8)
    assert (apply(name, 10, image=image) == image).all()


def test_color_and_sharpness_are_their_law():
    """The same as by Pillow, with grey and smooth cut to whole numbers as the original's: one level is float32's."""
    image = picture()
    x = image.astype(float)
    grey = np.floor(x @ [0.2989, 0.5870, 0.1140] * (255.5 / 255))[..., None].repeat(3, axis=2)
    smooth = x.copy()
    nine = sum(x[1 + dy : 59 + dy, 1 + dx : 83 + dx] for dy in (-1, 0, 1) for dx in (-1, 0, 1))
    smooth[1:-1, 1:-1] = np.floor((nine + 4 * x[1:-1, 1:-1]) / 13)
    for name, other in (("Color", grey), ("Sharpness", smooth)):
        for magnitude in range(21):
            want = np.clip(np.floor(other + factor(magnitude) * (x - other) + 1e-6), 0, 255)
            assert np.mean(apply(name, magnitude) != want) < 2e-3, (name, magnitude)


def moves(magnitude, sign, height, width):
    """Return where each operation takes pixel (x, y) from: rows of coefficients of x, y and 1."""
    a, shear, shift = sign * magnitude * 3 * pi / 180, sign * magnitude * 0.03, sign * magnitude * 10
    x, y = (width - 1) / 2, (height - 1) / 2
    turn = [[cos(a), -sin(a), x - cos(a) * x + sin(a) * y], [sin(a), cos(a), y - sin(a) * x - cos(a) * y]]
    return {
        "Rotate": turn,
        "ShearX": [[1, shear, 0], [0, 1, 0]],
        "ShearY": [[1, 0, 0], [shear, 1, 0]],
        "TranslateX": [[1, 0, shift], [0, 1, 0]],
        "TranslateY": [[1, 0, 0], [0, 1, shift]],
    }


@pytest.mark.parametrize("name", moves(0, 1, 1, 1))
@pytest.mark.parametrize(("height", "width"), [(60, 84), (224, 224)])
def test_moved_pixels_are_pillows(name, height, width):
    """Exactly, but for pixels half-way between two: those go up here, and by a float's last bit in Pillow."""
    image = picture(height, width)
    at = np.stack([*np.mgrid[:height, :width][::-1], np.ones((height, width))])
    for magnitude in range(21):
        for sign, draw in ((1, UP), (-1, DOWN)):
            rows = np.array(moves(magnitude, sign, height, width)[name])
            halves = 0.5 - rows[:, :2].sum(axis=1, keepdims=True) / 2  # Pillow's pixels have their centres at halves
            coefficients = np.concatenate([rows[:, :2], rows[:, 2:] + halves], axis=1).ravel()
            want = Image.fromarray(image).transform(
                (width, height), Image.AFFINE, coefficients, Image.NEAREST, fillcolor=(128, 128, 128)
            )
            from_x, from_y = np.tensordot(rows, at, 1)
            half_way = np.minimum(np.abs(from_x % 1 - 0.5), np.abs(from_y % 1 - 0.5)) < 5e-3
            differ = (apply(name, magnitude, draw, image) != np.asarray(want)).any(axis=2)
            assert not (differ & ~half_way).any(), (magnitude, sign)
            assert half_way.mean() < 0.12, (magnitude, sign)


def test_cutout_is_a_square_around_a_place():
    image = picture()
    for magnitude, y, x in [(0, 0.5, 0.5), (3, 0.5, 0.25), (10, 0.0, 0.99), (20, 0.3, 0.3)]:
        half, row, column = magnitude * 4, int(y * 60), int(x * 84)
        got = OPERATIONS["Cutout"](image, magnitude / 10, iter([y, x]))
        rows, columns = np.mgrid[:60, :84]
        inside = (rows >= row - half) & (rows < row + half) & (columns >= column - half) & (columns < column + half)
        assert (got[inside] == 128).all()
        assert (got[~inside] == image[~inside]).all()


def test_operations_and_directions_are_uniform(monkeypatch):
    seen = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, level, draw, name=name: seen.append(name) or image)
    for position in range(3200):
        rand_augment(picture(2, 2), (3, 0, position), 2, 15)
    counts = np.array([seen.count(name) for name in OPERATIONS])
    assert counts.sum() == 6400
    assert ((counts - 400) ** 2 / 400).sum() < 37.7  # chi-square of 15 degrees of freedom, 1 in 1000
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert sum(a == b for a, b in pairs) == pytest.approx(200, abs=45)


def test_layers_follow_each_other_from_the_keys_numbers():
    image, key = picture(), (7, 1, 40)
    draw = draws(key, 5)
    want = image
    for _ in range(3):
        want = list(OPERATIONS.values())[int(next(draw) * 16)](want, 1.5, draw)
    assert (rand_augment(image, key, 3, 15) == want).all()
    assert (rand_augment(image, key, 0, 15) == image).all()


def test_it_is_pure_and_pinned():
    image = picture()
    before = image.copy()
    checksums = [zlib.crc32(rand_augment(image, (1, 2, p), 2, 15).tobytes()) for p in range(3)]
    assert (image == before).all()
    assert [f"{c:08x}" for c in checksums] == ["841e334c", "7246c03d", "1d312f1f"]
    assert (
        len({zlib.crc32(rand_augment(image, key, 2, 15).tobytes()) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3)]}) == 3
    )


def test_the_transform_is_the_crop_and_then_the_operations():
    transform, image = RandAugment(InceptionCrop(48), 2, 15), picture(130, 170)
    assert transform.size == 48
    for position in range(20):
        key = (1, 0, position)
        got = transform(image, key)
        assert (got == rand_augment(InceptionCrop(48)(image, key), key, 2, 15)).all()
        top, left, h, w = transform.box(130, 170, key)
        assert (pickle.loads(pickle.dumps(transform)).finish(image[top : top + h, left : left + w], key) == got).all()


def test_presets_are_the_papers():
    """Figure 4 of arXiv:2106.10270, as big_vision's configs/vit_i1k.py spells it out."""
    assert {name: tuple(preset) for name, preset in PRESETS.items()} == {
        "light1": (2, 0, 0.0), "light2": (2, 10, 0.2), "medium1": (2, 15, 0.2), "medium2": (2, 15, 0.5),
        "strong1": (2, 20, 0.5), "strong2": (2, 20, 0.8),
    }  # fmt: skip


def test_magnitudes_beyond_the_original_are_refused():
    for magnitude in (-1, 21):
        with pytest.raises(UserError, match=f"magnitude is {magnitude}; give one from 0 to 20"):
            RandAugment(InceptionCrop(48), 2, magnitude)
