"""Names of the samples of a run: where they are, for people."""

from collections.abc import Iterator

import numpy as np

from shards.dataset import Dataset
from shards.mixedorder import MixedOrder
from shards.mixture import Mixture
from shards.order import Order


def tar_name(dataset: Dataset | Mixture, shard: int) -> str:
    """Return the tar of a shard; of a mixture with the data set that it is in."""
    source, inside = dataset.place(shard)
    return f"{source.url}/{source.paths[inside]}" if len(dataset.datasets) > 1 else source.paths[inside]


def sample_names(dataset: Dataset | Mixture, order: Order | MixedOrder, positions: np.ndarray) -> Iterator[dict]:
    """Yield ``tar`` and ``key`` of the samples at int64 [n] positions of an order."""
    _, shards, indices = order.locate(positions)
    for shard, index in zip(shards.tolist(), indices.tolist(), strict=True):
        source, inside = dataset.place(shard)
        yield {"tar": tar_name(dataset, shard), "key": source.rows(inside).keys[index].as_py()}
