import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from shards.decode import DECODER, DecodeError, decode

RNG = np.random.default_rng(0)
SMOOTH = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((80, 60), Image.BICUBIC))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 80, "progressive": True, "subsampling": 0}])
def test_jpeg_agrees_with_pillow(options):
    data = encoded(Image.fromarray(SMOOTH), "JPEG", **options)
    image = decode(data, "a")
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert np.abs(image.astype(int) - pillow(data)).max() <= 3  # two builds of libjpeg-turbo


def test_lossless_images_are_exact():
    for kind, options in [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {})]:
        assert (decode(encoded(Image.fromarray(SMOOTH), kind, **options), "a") == SMOOTH).all()


def test_grey_palette_and_bilevel_become_rgb():
    grey = Image.fromarray(SMOOTH).convert("L")
    want = np.repeat(np.asarray(grey)[:, :, None], 3, 2)
    assert (decode(encoded(grey, "PNG"), "a") == want).all()
    assert np.abs(decode(encoded(grey, "JPEG", quality=98), "a").astype(int) - want).max() < 12
    few = Image.fromarray(SMOOTH).quantize(16)
    assert (decode(encoded(few, "PNG"), "a") == np.asarray(few.convert("RGB"))).all()
    assert set(np.unique(decode(encoded(grey.convert("1"), "PNG"), "a"))) == {0, 255}


def test_transparency_is_laid_on_white():
    alpha = RNG.integers(0, 256, SMOOTH.shape[:2], dtype=np.uint8)
    data = encoded(Image.fromarray(np.dstack([SMOOTH, alpha])), "PNG")
    share = alpha[:, :, None] / 255
    assert np.abs(decode(data, "a") - (SMOOTH * share + 255 * (1 - share))).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] * 2)
    assert (decode(encoded(palette, "PNG", transparency=0), "a") == 255).all()
    grey = Image.fromarray(np.dstack([SMOOTH[:, :, 0], np.zeros_like(alpha)]), "LA")
    assert (decode(encoded(grey, "PNG"), "a") == 255).all()


def test_sixteen_bits_are_cut_to_eight():
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = decode(encoded(Image.fromarray(deep), "PNG"), "a")
    assert (image == (deep >> 8)[:, :, None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(SMOOTH), kind, exif=exif)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose, by Pillow's own names of them
    want = Image.open(io.BytesIO(data)).convert("RGB")
    if orientation > 1:
        want = want.transpose(Image.Transpose(turned[orientation]))
    image = decode(data, "a")
    assert image.shape == (want.height, want.width, 3)
    assert np.abs(image.astype(int) - np.asarray(want)).max() <= 3


def test_broken_exif_is_passed_over():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(SMOOTH), "JPEG", exif=exif)
    at = data.index(b"Exif\0\0") + 6
    for junk in (b"XX*\0", b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        image = decode(data[:at] + junk + data[at + len(junk) :], "a")
        assert sorted(image.shape) == [3, 60, 80]


def test_cmyk_jpeg():
    data = encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
    assert (decode(data, "a") == pillow(data)).all()


def test_stray_bytes_are_passed_over_but_not_a_cut_file():
    data = encoded(Image.fromarray(SMOOTH), "JPEG", quality=95)
    stray = data.replace(b"\xff\xdb", b"\0\0\0\xff\xdb", 1)  # before a table
    with pytest.raises(ValueError, match="xtraneous"):
        simplejpeg.decode_jpeg(stray)
    assert (decode(stray, "a") == pillow(data)).all()
    for kind in ("JPEG", "PNG", "WEBP"):
        whole = encoded(Image.fromarray(SMOOTH), kind)
        for part in (whole[: len(whole) // 2], b"", whole[:20]):
            with pytest.raises(DecodeError, match="n01/cat_7"):
                decode(part, "n01/cat_7")


def test_reasons_are_the_same_in_every_run():
    """They go into receipts: no address of an object, and no exception of any other kind."""
    data = encoded(Image.fromarray(SMOOTH), "JPEG")
    for broken, reason in [
        (data[:2] + b"\xff\xdb\0\5\0ab" + data[2:], "no known image format"),
        (encoded(Image.fromarray(SMOOTH), "PNG")[:33] + encoded(Image.fromarray(SMOOTH), "PNG")[-12:], "cannot load"),
    ]:
        with pytest.raises(DecodeError, match=reason) as caught:
            decode(broken, "a")
        assert reason in str(caught.value.__cause__)


def test_a_bomb_is_refused():
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = encoded(Image.fromarray(SMOOTH), "PNG")
    bomb = bomb[:12] + header + struct.pack(">I", zlib.crc32(header)) + bomb[33:]
    with pytest.raises(DecodeError, match="bomb"):
        decode(bomb, "a")


def test_decoder_names_its_versions():
    assert simplejpeg.__version__ in DECODER
    assert Image.__version__ in DECODER


def test_large_images_are_decoded_in_bands_to_the_same_pixels(monkeypatch):
    alpha = RNG.integers(0, 256, SMOOTH.shape[:2], dtype=np.uint8)
    palette = Image.fromarray(SMOOTH).quantize(16)
    deep = Image.fromarray(np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13)
    images = [encoded(each, "PNG") for each in (Image.fromarray(np.dstack([SMOOTH, alpha])), palette, deep)]
    images += [encoded(palette, "PNG", transparency=3), encoded(Image.fromarray(SMOOTH), "WEBP")]
    whole = [decode(data, "a") for data in images]
    monkeypatch.setattr("shards.decode._BAND", 80 * 7)
    for data, want in zip(images, whole, strict=True):
        assert (decode(data, "a") == want).all()


def test_a_few_bytes_that_claim_many_pixels_take_no_memory():
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 12_000, 12_000, 8, 6, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(9))),
        (b"IEND", b""),
    ]
    body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    with pytest.raises(DecodeError, match=r"12000 x 12000 pixels are more than \d+ bytes can hold"):
        decode(b"\x89PNG\r\n\x1a\n" + b"".join(body), "a")
