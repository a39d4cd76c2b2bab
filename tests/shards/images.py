"""Small real images for the tests of this folder."""

import io
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encode(seed: int, format: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """Return an encoded noise image, ``size`` as (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def make_source(folder: Path, classes: int = 3, each: int = 10) -> Path:
    """Fill ``folder`` with one folder of images a class, of all formats, spellings and depths."""
    kinds = [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".png", "PNG"), (".WebP", "WEBP")]
    for label in range(classes):
        for i in range(each):
            extension, format = kinds[i % len(kinds)]
            path = folder / f"class.{label}" / ("deep/er" if i % 5 == 4 else "") / f"im.{i}{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(zlib.crc32(path.name.encode()) + label, format, (20 + i, 16 + label)))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder``, hidden ones too, with its content."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
