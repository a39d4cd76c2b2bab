"""Which way up a stored image is: the one reader of EXIF orientation, for what is recorded and what is decoded.

Only EXIF data counts, wherever in the file it stands: no XMP, and no text that some program hid it in.
"""

import struct
from collections.abc import Iterator

SCAN = 0xDA  # the marker of a JPEG's compressed data
_EXIF = b"Exif\x00\x00"
_TAG = 0x0112
_NUMBERS = {1: "B", 3: "H", 4: "I"}  # some write other than the short number that is asked for


def read_orientation(data: bytes) -> int:
    """Return the orientation of a jpg, png or webp image, 1 (upright) to 8, as in EXIF 2.32, table 6.

    It is 1 if the image says none, if that is damaged, and for anything but an image.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _of_tiff(_exif(data, jpeg_segments(data), 0xE1))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _of_tiff(_exif(data, _chunks(data, png=True), b"eXIf"))
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _of_tiff(_exif(data, _chunks(data, png=False), b"EXIF"))
    return 1


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of the content of each segment up to the first scan (ITU-T T.81, annex B)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, at + 4, min(end, len(data))
        if marker == SCAN:
            return
        at = end


def _chunks(data: bytes, png: bool) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, start and end of the content of each chunk of a PNG or WebP file."""
    at = 8 if png else 12
    while at + 8 <= len(data):
        first, second = data[at : at + 4], data[at + 4 : at + 8]
        kind, length = (second, int.from_bytes(first, "big")) if png else (first, int.from_bytes(second, "little"))
        yield kind, at + 8, at + 8 + length
        at += 8 + length + (4 if png else length % 2)  # a checksum, or what makes it even


def _exif(data: bytes, parts: Iterator[tuple[int | bytes, int, int]], wanted: int | bytes) -> bytes:
    """Return the EXIF data in the first part of the wanted kind; a JPEG may have other things in such a part."""
    for kind, start, end in parts:
        if kind == wanted and (wanted != 0xE1 or data.startswith(_EXIF, start, end)):
            return data[start:end].removeprefix(_EXIF)  # some write it into WebP, too
    return b""


def _of_tiff(exif: bytes) -> int:
    """Return what the first directory of EXIF data, a TIFF file, says."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if not order:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, values = struct.unpack_from(f"{order}HHI", exif, entry)
            if tag == _TAG and kind in _NUMBERS and values == 1:
                (orientation,) = struct.unpack_from(order + _NUMBERS[kind], exif, entry + 8)
                return orientation if 1 <= orientation <= 8 else 1
    except struct.error:  # cut short
        pass
    return 1
