"""The draws of stochastic depth: which samples skip which branches, a pure function of positions and a seed."""

import sys

import numpy as np

from shards.hashing import hash_array, hash_int

_DROP_PATH = 9  # first word of its hashes; shards/hashing.py lists all


def drop_path_draws(positions: np.ndarray, epoch_samples: int | None, seed: int, blocks: int) -> np.ndarray:
    """Return what a model takes as ``draws``, so that a sample's are the same on any number of ranks.

    Args:
        positions: int64 [n], global positions of the samples, as in ``Batch.positions``.
        epoch_samples: samples of an epoch; None: it never ends.
        seed: of the run.
        blocks: blocks of the model, of two branches each.

    Returns:
        float32 [n, blocks, 2], uniform in [0, 1).
    """
    epochs = positions // (epoch_samples or sys.maxsize)
    branches = np.arange(2 * blocks)
    hashes = hash_array(hash_int(_DROP_PATH, seed), epochs[:, None], positions[:, None], branches)  # [n, 2 * blocks]
    return ((hashes >> np.uint64(40)) * np.float32(2**-24)).astype(np.float32).reshape(len(positions), blocks, 2)
