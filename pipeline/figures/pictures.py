"""The images that figures are drawn of: from a data set, a folder, or a file."""

from pathlib import Path

import numpy as np

from shards.augment import Resize
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def read_pictures(source: str | Dataset, count: int, side: int) -> np.ndarray:
    """Return at most ``count`` images, squeezed to squares: uint8 [n, side, side, 3].

    Args:
        source: An image file; a folder of image files, however deep, in the order of their names; or a data set, of
            which as many are taken at even distances.
        count: Of images.
        side: In pixels.

    Raises:
        UserError: There are none.
    """
    if isinstance(source, str) and (files := _files(source)) is not None:
        encoded = [(each.read_bytes(), each.name) for each in files[:count]]
    else:
        dataset = Dataset.open(source) if isinstance(source, str) else source
        places = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int))
        samples = [dataset[int(place)] for place in places]
        encoded = [(each.image, each.key) for each in samples]
    squeeze = Resize(side)
    return np.stack([squeeze(decode(data, name), (0, 0, 0)) for data, name in encoded])


def _files(source: str) -> list[Path] | None:
    """Return the image files at a path; None: a data set is there, or it is a URL."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir() or (path / "manifest").is_dir():
        return None
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{source} holds neither images ({', '.join(sorted(SUFFIXES))}) nor a data set's manifest")
    return files
