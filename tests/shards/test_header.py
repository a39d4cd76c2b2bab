"""Broken images are told from whole ones without decoding."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from shards.header import BrokenImageError, read_header
from tests.shards.images import encode


@pytest.mark.parametrize(("format", "name"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_whole_images_pass_and_cut_ones_do_not(format, name):
    data = encode(1, format, (40, 30))
    assert read_header(data) == (name, 40, 30, 1)
    assert read_header(data + b"\0\0") == (name, 40, 30, 1)  # padding behind the end does no harm
    for keep in (0.02, 0.5, 0.9, 0.99):
        with pytest.raises(BrokenImageError):
            read_header(data[: int(len(data) * keep)])
    with pytest.raises(BrokenImageError):
        read_header(data[:-9])


def test_exif_size_is_the_stored_one_and_a_thumbnail_is_no_end():
    thumbnail = encode(2, size=(8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    block = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0") + thumbnail
    data = encode(1, size=(40, 30))
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    assert read_header(data) == ("jpg", 40, 30, 6)
    with pytest.raises(BrokenImageError, match="no end marker"):
        read_header(data[:-2])  # the thumbnail's own end marker is still in it


def test_png_checksums_count():
    data = bytearray(encode(1, "PNG"))
    data[len(data) // 2] ^= 1
    with pytest.raises(BrokenImageError):
        read_header(bytes(data))


def test_other_content_is_named():
    gif = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(gif, "GIF")
    for data, reason in [(b"", "empty file"), (b"<html>", "not a jpg"), (gif.getvalue(), "not a jpg")]:
        with pytest.raises(BrokenImageError, match=reason):
            read_header(data)
