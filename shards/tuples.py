"""Many short tuples of numbers as two arrays, made of an Arrow column without a Python object for each."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


class Tuples(Sequence):
    """A sequence of tuples of integers or floats; a missing list is an empty tuple.

    Args:
        lists: Of integers or floats.
    """

    def __init__(self, lists: pa.ChunkedArray):
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._starts = self._ends - lengths
        self._values = pc.list_flatten(lists).to_numpy()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple:  # type: ignore[override]
        return tuple(self._values[self._starts[index] : self._ends[index]].tolist())
