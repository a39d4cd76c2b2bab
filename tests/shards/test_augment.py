import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from shards.augment import (
    TRANSFORMS,
    CenterCrop,
    InceptionCrop,
    Resize,
    ResizeCenterCrop,
    ResizeCrop,
    draws,
    inception_box,
)

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (150, 200, 3), dtype=np.uint8)
PLACE = np.dstack([*np.mgrid[0:150, 0:200], np.zeros((150, 200))]).astype(np.uint8)  # a pixel says where it is


def reference(image, height, width):
    """Bilinear, half-pixel centres, no antialias: tf.image.resize, and so the paper's code."""
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear", antialias=False)
    return x[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [32, 96, 224, 300])
def test_resize_is_bilinear_without_antialias(size):
    assert np.abs(Resize(size)(NOISE, (0, 0, 0)) - reference(NOISE, size, size)).max() <= 1.01  # of 255


def test_center_crop():
    image = CenterCrop(96, 112)(NOISE, (0, 0, 0))
    want = reference(NOISE, 112, round(200 * 112 / 150))
    left = (want.shape[1] - 96) // 2
    assert np.abs(image - want[8:104, left : left + 96]).max() <= 1.01
    assert CenterCrop(224)(NOISE[:, :20], (0, 0, 0)).shape == (224, 224, 3)


def by_numpy(image, side, crop):
    """The middle ``crop`` of the ``side`` x ``side`` square, each pixel looked up where it lies in the image."""
    image = image.astype(np.float64)

    def neighbours(length):
        margin = (side - crop) // 2
        place = np.clip((np.arange(margin, margin + crop) + 0.5) * length / side - 0.5, 0, length - 1)
        low = np.minimum(np.floor(place).astype(int), length - 2)
        return low, place - low

    (top, down), (left, right) = (neighbours(length) for length in image.shape[:2])
    rows = image[top] * (1 - down)[:, None, None] + image[top + 1] * down[:, None, None]
    return rows[:, left] * (1 - right)[None, :, None] + rows[:, left + 1] * right[None, :, None]


@pytest.mark.parametrize("shape", [(150, 200), (61, 30), (300, 256), (2, 9)])
@pytest.mark.parametrize(("size", "larger"), [(224, 256), (384, 439), (16, 18)])
def test_resize_center_crop_is_the_middle_of_a_square_of_8_7(shape, size, larger):
    """big_vision's few-shot view, ``resize(256)|central_crop(224)``: the square is squeezed, whatever the image."""
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.abs(ResizeCenterCrop(size)(image, (0, 0, 0)) - by_numpy(image, larger, size)).max() <= 1.01  # of 255


def test_resize_crop_is_a_part_of_the_larger_square():
    larger = reference(NOISE, 112, 112)
    seen = set()
    for position in range(40):
        image = ResizeCrop(96, 112)(NOISE, (0, 0, position))
        fits = [
            (top, left, mirrored)
            for top in range(17)
            for left in range(17)
            for mirrored in (1, -1)
            if np.abs(image[::16, ::mirrored] - larger[top : top + 96 : 16, left : left + 96]).max() <= 1.01
        ]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) > 30
    assert {m for _, _, m in seen} == {1, -1}


@pytest.mark.parametrize("transform", [InceptionCrop(64), ResizeCrop(64), InceptionCrop(64, shrink=True)])
def test_without_a_mirror_it_is_the_same_part_never_mirrored(transform):
    never, turned = replace(transform, mirror=False), 0
    for position in range(30):
        key = (1, 0, position)
        image, plain = transform(PLACE.copy(), key), never(PLACE.copy(), key)
        mirrored = not np.array_equal(image, plain)
        assert np.array_equal(image[:, ::-1] if mirrored else image, plain)
        assert plain[0, 0, 1] < plain[0, -1, 1]  # columns grow to the right
        turned += mirrored
    assert 5 < turned < 25


def test_inception_crop_is_its_box_resized():
    transform, mirrored = InceptionCrop(64), 0
    for position in range(30):
        key = (1, 0, position)
        draw = draws(key)
        coin = next(draw)
        top, left, h, w = inception_box(150, 200, draw)
        want = reference(NOISE[top : top + h, left : left + w], 64, 64)
        if coin < 0.5:
            want, mirrored = want[:, ::-1], mirrored + 1
        assert np.abs(transform(NOISE, key) - want).max() <= 1.01
    assert 5 < mirrored < 25


def test_antialiased_resize_would_be_told_apart():
    """The tolerance above is tight enough to notice the wrong filter."""
    wrong = np.asarray(Image.fromarray(NOISE).resize((32, 32), Image.BILINEAR))
    assert np.abs(wrong - reference(NOISE, 32, 32)).max() > 40


def tensorflow_law(height, width, rng):
    """Boxes by rejection: the law of sample_distorted_bounding_box in its plainest form."""
    while True:
        ratio = rng.uniform(3 / 4, 4 / 3)
        low = np.rint(np.sqrt(0.05 * height * width / ratio))
        most = [h for h in range(1, height + 1) if np.rint(h * ratio) <= width]
        high = min(np.rint(np.sqrt(height * width / ratio)), most[-1])
        h = rng.integers(low, high + 1)
        w = np.rint(h * ratio)
        if 0.05 * height * width <= h * w <= height * width:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w


@pytest.mark.parametrize(("height", "width"), [(60, 80), (90, 40)])
def test_crops_follow_the_law(height, width):
    n = 3000
    ours = np.array([inception_box(height, width, draws((3, 0, p))) for p in range(n)], dtype=float)
    rng = np.random.default_rng(1)
    law = np.array([tensorflow_law(height, width, rng) for _ in range(n)], dtype=float)
    top, left, h, w = ours.T
    assert (h * w >= 0.05 * height * width).all()
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    error = np.sqrt((ours.var(axis=0) + law.var(axis=0)) / n)
    assert (np.abs(ours.mean(axis=0) - law.mean(axis=0)) < 4 * error).all()
    for part in (0.1, 0.5, 0.9):
        assert np.abs(np.quantile(ours, part, axis=0) - np.quantile(law, part, axis=0)).max() <= 4


def test_an_image_that_no_crop_fits_is_taken_whole():
    assert inception_box(1, 400, draws((0, 0, 0))) == (0, 0, 1, 400)
    assert InceptionCrop(32)(NOISE[:1], (0, 0, 0)).shape == (32, 32, 3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_pure_and_of_one_size(name):
    transform = TRANSFORMS[name](48)
    before = NOISE.copy()
    one = transform(NOISE, (1, 2, 3))
    assert one.shape == (48, 48, 3)
    assert one.dtype == np.uint8
    assert (pickle.loads(pickle.dumps(transform))(NOISE, (1, 2, 3)) == one).all()
    assert (before == NOISE).all()
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        same = (transform(PLACE, other) == transform(PLACE, (1, 2, 3))).all()
        assert same == (name in ("resize", "center_crop", "resize_center_crop"))


def test_draws_are_uniform_and_pinned():
    draw = draws((0, 0, 0))
    values = np.array([next(draw) for _ in range(4000)])
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(np.full(10, 400), abs=80)
    assert np.corrcoef(values[:-1], values[1:])[0, 1] == pytest.approx(0, abs=0.06)
    assert values[:3].tolist() == [0.4490127000092683, 0.7095518738686369, 0.770409118467503]


def test_center_crop_of_a_line_takes_its_middle_and_little_memory():
    line = np.zeros((1, 500_000, 3), np.uint8)  # resized whole, it would be 98 GB
    line[:, 250_000] = 255
    for image in (line, line.transpose(1, 0, 2)):
        made = CenterCrop(224)(np.ascontiguousarray(image), (0, 0, 0))
        assert made.shape == (224, 224, 3)
        assert made.max() > 200  # it is the middle of the line
