"""Oxford's 102 flowers as downloaded (``jpg/``, ``imagelabels.mat``, ``setid.mat``), in the parts train, val, test."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.errors import UserError
from shards.sources import Item
from shards.sources.official import Official

LABELS, SETS = "imagelabels.mat", "setid.mat"
PARTS = {"train": "trnid", "val": "valid", "test": "tstid"}  # numbers of images from 1, in setid.mat


class Flowers(Official):
    """The flowers: 102 classes, which have no names in the download, 1,020 images to train, 1,020 and 6,149 others.

    Args:
        root: Folder that has ``jpg`` and the two files.
        unpacked: Not needed.

    Raises:
        UserError: A file is missing, or is none of these.
    """

    kind = "flowers"
    mark = SETS
    parts = tuple(PARTS)

    def __init__(self, root: str, unpacked: Path | None):
        super().__init__(root, unpacked)
        self._labels = self._read(LABELS, "labels") - 1
        self._ids = {part: self._read(SETS, key) for part, key in PARTS.items()}
        ids = np.concatenate(list(self._ids.values()))
        number = len(self._labels)
        if not (len(ids) and number and ids.min() >= 1 and ids.max() <= number and self._labels.min() >= 0):
            raise UserError(f"{SETS} and {LABELS} of {root} do not fit each other; get both again")
        self.classes = [f"{label + 1:03d}" for label in range(int(self._labels.max()) + 1)]

    def items(self) -> Iterator[Item]:
        """Yield the images part by part, by their numbers."""
        for part, ids in self._ids.items():
            for number in np.sort(ids).tolist():
                name = f"image_{number:05d}"
                yield Item(name, f"jpg/{name}.jpg", 0, -1, (int(self._labels[number - 1]),), part=part)

    def _read(self, name: str, key: str) -> np.ndarray:
        """Return a row of integers of a file of MATLAB's."""
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise UserError("the flowers' lists need scipy; install it: pip install 'patchmill[imagenet]'") from error
        data = self._bytes(name, "get it from the page of the data set")
        try:
            return loadmat(io.BytesIO(data))[key].ravel().astype(np.int64)
        except Exception as error:  # a damaged file takes scipy anywhere
            raise UserError(f"{self.root}/{name} is damaged, or another file: {error}; get it again") from error
