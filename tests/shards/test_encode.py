"""Images made anew: size, orientation, format; and that what need not change keeps its bytes."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from shards.decode import DecodeError, decode
from shards.encode import Encoding
from shards.header import read_header


def picture(width, height, seed=0):
    """A smooth picture with some detail, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def encoded(pixels, format="JPEG", orientation=1, **options):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, format, **({"exif": exif} if orientation != 1 else {}), **options)
    return file.getvalue()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def apply(encoding, data):
    made = encoding.apply(data, read_header(data), "key")
    if made is None:
        return None
    assert made[1] == read_header(made[0])
    return made[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 301), (640, 480), (2000, 900)])
def test_shrunk_jpeg_is_upright_and_close_to_lanczos(width, height, orientation):
    data = encoded(picture(width, height), orientation=orientation, quality=95)
    made = apply(Encoding(resize_short=100), data)
    header = read_header(made)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    long = round(max(upright.size) * 100 / min(upright.size))
    expected = (long, 100) if upright.width > upright.height else (100, long)
    assert header == ("jpg", *expected, 1)
    theirs = np.asarray(upright.resize(expected, Image.LANCZOS))
    assert psnr(decode(made, "key"), theirs) > 33  # quality 90 alone leaves about 36


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_large_factors_average_and_do_not_alias(format):
    stripes = np.zeros((900, 1200, 3), np.uint8)
    stripes[:, ::2] = 255  # of one pixel: any sampling that skips pixels shows a pattern
    made = decode(apply(Encoding(resize_short=90), encoded(stripes, format, quality=95)), "key")
    assert made.shape == (90, 120, 3)
    assert made.std() < 4
    assert abs(made.mean() - 127.5) < 4


@pytest.mark.parametrize(("factor", "least"), [(1.8, 22), (1.95, 24)])
def test_factors_below_two_do_not_alias_either(factor, least):
    """Of noise all that is finer than the new pixels must go: interpolation alone keeps it, at 18 dB from Lanczos."""
    noise = np.random.default_rng(0).integers(0, 256, (360, 480, 3), dtype=np.uint8)
    made = decode(apply(Encoding(resize_short=round(360 / factor)), encoded(noise, "PNG")), "key")
    theirs = Image.fromarray(noise).resize((made.shape[1], made.shape[0]), Image.LANCZOS)
    assert psnr(made, np.asarray(theirs)) > least


def test_small_images_keep_their_bytes():
    data = encoded(picture(120, 90))
    assert apply(Encoding(), data) is None
    assert apply(Encoding(resize_short=90), data) is None
    assert apply(Encoding(resize_short=90, format="jpg"), data) is None
    assert read_header(apply(Encoding(resize_short=90, quality=50), data)) == ("jpg", 120, 90, 1)


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_every_format_into_every_format(format):
    for source in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(64, 48), source)
        made = apply(Encoding(format=format), data)
        if made is None:
            assert read_header(data).format == format
            continue
        assert read_header(made) == (format, 64, 48, 1)
        pixels, ours = decode(data, "key"), decode(made, "key")
        if format == "png":
            assert np.array_equal(ours, pixels)
            continue
        theirs = decode(encoded(pixels, {"jpg": "JPEG", "webp": "WEBP"}[format], quality=90), "key")
        assert psnr(ours, pixels) > psnr(theirs, pixels) - 0.5


def test_quality_matters_and_the_same_bytes_come_out_every_time():
    data = encoded(picture(300, 200), quality=98)
    sizes = [len(apply(Encoding(quality=quality), data)) for quality in (20, 60, 95)]
    assert sizes == sorted(sizes)
    assert apply(Encoding(resize_short=50), data) == apply(Encoding(resize_short=50), data)


def test_odd_depths_and_colours():
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    made = decode(apply(Encoding(resize_short=24), file.getvalue()), "key")
    assert made.shape == (24, 32, 3)
    assert abs(made.mean() - 127.5) < 2
    file = io.BytesIO()
    Image.fromarray(picture(64, 48)).convert("CMYK").save(file, "JPEG", quality=95)
    made = apply(Encoding(resize_short=24), file.getvalue())
    assert read_header(made) == ("jpg", 32, 24, 1)
    assert simplejpeg.decode_jpeg_header(made)[2] == "YCbCr"


def test_damage_is_found():
    data = bytearray(encoded(picture(300, 200), quality=95))
    data[len(data) // 2 : len(data) // 2 + 20] = b"\xff\xda" * 10
    with pytest.raises(DecodeError):
        apply(Encoding(resize_short=50), bytes(data))
