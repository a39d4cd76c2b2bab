"""Which patches the encoder of a masked autoencoder sees: keyed by seed, epoch and position."""

import sys

import numpy as np

from shards.hashing import hash_array, hash_int

_MASKING = 11  # first word of its hashes; shards/hashing.py lists all


def visible_count(patches: int, share: float) -> int:
    """Return how many patches of each image are seen when ``share`` of them is masked; at least one is, not all are."""
    return patches - min(max(1, round(share * patches)), patches - 1)


def visible_patches(
    positions: np.ndarray, epoch_samples: int | None, seed: int, patches: int, share: float
) -> np.ndarray:
    """Return the patches that are seen, the same on any number of ranks.

    Args:
        positions: int64 [n], global positions of the samples, as in ``Batch.positions``.
        epoch_samples: samples of an epoch; None: it never ends.
        seed: of the run.
        patches: number N of patches of an image.
        share: of the patches that are masked.

    Returns:
        int64 [n, v], ascending.
    """
    epochs = positions // (epoch_samples or sys.maxsize)
    keys = hash_array(hash_int(_MASKING, seed), epochs[:, None], positions[:, None], np.arange(patches))  # [n, N]
    return np.sort(np.argsort(keys, axis=1, kind="stable")[:, : visible_count(patches, share)], axis=1)
