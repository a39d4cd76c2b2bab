import cv2
import numpy as np
import pytest

from shards import jpegcrop
from shards import resize as module
from shards.errors import UserError
from shards.resize import resize


def opencv(image, height, width, mirror):
    whole = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return whole[:, ::-1] if mirror else whole


@pytest.fixture
def natively():
    """Resizes with the native code alone."""
    try:
        jpegcrop.build()
    except UserError as error:
        pytest.skip(str(error))
    jpegcrop._native.cache_clear()
    library = jpegcrop.native()
    if module._natively(library, np.zeros((2, 2, 3), np.uint8), 2, 2, False) is None:
        pytest.skip("the native resize is not for this processor")
    return lambda *arguments: module._natively(library, *arguments)


def test_the_native_resize_gives_opencvs_bits(natively):
    rng = np.random.default_rng(0)
    for most in [4] * 300 + [60] * 300 + [700] * 60:
        height, width, to_height, to_width = (int(x) for x in rng.integers(1, most + 1, 4))
        kind = rng.integers(3)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8) if kind else np.full(
            (height, width, 3), rng.choice([0, 255]), np.uint8)  # fmt: skip
        for size in ((to_height, to_width), (224, 224)):
            for mirror in (False, True):
                got = natively(image, *size, mirror)
                assert (got == opencv(image, *size, mirror)).all(), (height, width, size, mirror)


def test_parts_of_images_and_turned_ones_resize_alike(natively):
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    for part in (image[7:50, 11:99], image[-1:, -1:], image[::-1], image[:, ::-1], image[::2, ::3], image[:, :, ::-1],
                 np.rot90(image)):  # fmt: skip
        want = opencv(np.ascontiguousarray(part), 40, 30, False)
        assert (natively(part, 40, 30, False) == want).all()
        assert (resize(part, 40, 30) == want).all()


def test_nothing_behind_the_image_is_read(natively):
    for height, width in ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (5, 7)):
        for junk in (0, 255):
            memory = np.full(height * width * 3 + 64, junk, np.uint8)
            image = memory[: height * width * 3].reshape(height, width, 3)
            image[:] = 100
            assert (natively(image, 9, 9, False) == 100).all()


@pytest.mark.parametrize("mirror", [False, True])
def test_without_the_native_code_opencv_does_it(monkeypatch, mirror):
    image = np.random.default_rng(2).integers(0, 256, (33, 44, 3), dtype=np.uint8)
    monkeypatch.setattr(module, "native", lambda: None)
    assert (resize(image, 20, 25, mirror) == opencv(image, 20, 25, mirror)).all()


def test_another_opencv_is_asked_itself(natively, monkeypatch):
    image = np.random.default_rng(3).integers(0, 256, (33, 44, 3), dtype=np.uint8)
    monkeypatch.setattr(cv2, "resize", lambda image, size, interpolation: np.zeros((size[1], size[0], 3), np.uint8))
    module._is_opencv.cache_clear()
    try:
        assert not resize(image, 20, 25).any()
    finally:
        module._is_opencv.cache_clear()


@pytest.mark.parametrize(("shape", "size"), [((0, 5), (4, 4)), ((5, 0), (4, 4)), ((5, 5), (0, 4)), ((5, 5), (4, 0))])
def test_an_image_without_pixels_is_refused(shape, size):
    with pytest.raises(UserError, match=r"an image of .* cannot become one of"):
        resize(np.zeros((*shape, 3), np.uint8), *size)
