"""The orientation that is recorded is the one that images are decoded with, wherever EXIF data stands."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from shards.decode import decode
from shards.header import read_header
from shards.orientation import read_orientation
from tests.shards.images import encode

SEGMENT = b"\xff\xe2\xff\xff" + bytes(65533)  # of a JPEG, as long as one can be


def exif(orientation, order="<", kind=3, count=1):
    """Return EXIF data with another tag before the orientation."""
    number = struct.pack(order + {1: "B", 3: "H", 4: "I"}.get(kind, "H"), orientation).ljust(4, b"\0")
    tags = struct.pack(order + "HHII", 0x0100, 4, 1, 99) + struct.pack(order + "HHI", 0x0112, kind, count) + number
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, 2) + tags + bytes(4)


def jpeg(*segments, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (40, 30)).save(file, "JPEG")
    return file.getvalue()[:2] + b"".join(segments) + file.getvalue()[2:]


def app1(data):
    return b"\xff\xe1" + struct.pack(">H", len(data) + 8) + b"Exif\0\0" + data


def png(before=b"", after=b""):
    data = encode(1, "PNG", (40, 30))
    return data[:33] + before + data[33:-12] + after + data[-12:]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def webp(data, **options):
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "WEBP", exif=data, **options)
    return file.getvalue()


XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:Description tiff:Orientation=\"6\"/></x:xmpmeta>"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (jpeg(app1(exif(6))), 6),
        (jpeg(app1(exif(6, ">"))), 6),
        (jpeg(app1(exif(6, kind=4))), 6),
        (jpeg(SEGMENT, app1(exif(6))), 6),
        (jpeg(SEGMENT, SEGMENT, app1(exif(5)), mode="CMYK"), 5),
        (jpeg(app1(exif(6)), app1(exif(8))), 6),
        (jpeg(app1(exif(6)).replace(b"\xff\xe1", b"\xff\xe2")), 1),  # in some other segment
        (jpeg(app1(exif(0))), 1),
        (jpeg(app1(exif(9))), 1),
        (jpeg(app1(exif(6, count=2))), 1),
        (jpeg(app1(exif(6, kind=2))), 1),
        (jpeg(app1(exif(6)[:25])), 1),
        (jpeg(app1(b"")), 1),
        (png(chunk(b"eXIf", exif(6))), 6),
        (png(after=chunk(b"eXIf", exif(8, ">"))), 8),
        (png(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)), 1),
        (webp(exif(7)), 7),
        (webp(b"Exif\0\0" + exif(7), lossless=True), 7),
        (webp(b"", xmp=XMP), 1),
    ],
)
def test_what_is_recorded_is_what_is_decoded(data, expected):
    assert read_header(data) == (read_header(data).format, 40, 30, expected)
    whole = decode(data, "key")
    assert whole.shape == ((40, 30, 3) if expected > 4 else (30, 40, 3))
    assert np.array_equal(decode(data, "key", lambda height, width: (2, 3, 20, 20)), whole[2:22, 3:23])


def test_any_bytes_have_an_orientation():
    rng = np.random.default_rng(0)
    for data in (jpeg(SEGMENT, app1(exif(6))), png(after=chunk(b"eXIf", exif(6))), webp(exif(6)), b"", b"GIF89a"):
        for _ in range(200):
            bad = bytearray(data[: rng.integers(len(data) + 1)] if rng.random() < 0.5 else data)
            for at in rng.integers(0, len(bad), 5) if bad else ():
                bad[at] = rng.integers(256)
            assert read_orientation(bytes(bad)) in range(1, 9)


def test_odd_exif_data_says_nothing_to_the_terminal(tmp_path):
    for number, data in enumerate([jpeg(app1(exif(6, count=2))), jpeg(app1(exif(6, count=2)), mode="CMYK"),
                                   png(chunk(b"eXIf", exif(6, count=2))), webp(exif(6)[:30])]):  # fmt: skip
        (tmp_path / f"{number}").write_bytes(data)
    program = """
import sys
from pathlib import Path
from shards.decode import decode
from shards.header import read_header
for path in sorted(Path(sys.argv[1]).iterdir()):
    print(read_header(path.read_bytes()).orientation, decode(path.read_bytes(), "key").shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "1 (30, 40, 3)\n" * 4
    assert done.stderr == ""
