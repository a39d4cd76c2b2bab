"""Which patches are corrupted in masked patch prediction, and how: keyed by seed, epoch and position."""

import sys

import numpy as np

from shards.hashing import hash_array, hash_int

MASK = -1  # in place of the patch that another one's embedding is taken from: the learned mask embedding
_CORRUPTION = 10  # first word of its hashes; shards/hashing.py lists all


def corrupted_patches(patches: int, share: float) -> int:
    """Return how many patches of each image are corrupted; at least one is."""
    return max(1, round(share * patches))


def corruption(
    positions: np.ndarray,
    epoch_samples: int | None,
    seed: int,
    patches: int,
    share: float,
    masked: float,
    replaced: float,
) -> np.ndarray:
    """Return what becomes of which patches, the same on any number of ranks (paper, appendix B.1.2).

    The paper gives shares only; here every image has exactly those counts, rounded. A random other patch is one of the
    same image.

    Args:
        positions: int64 [n], global positions of the samples, as in ``Batch.positions``.
        epoch_samples: samples of an epoch; None: it never ends.
        seed: of the run.
        patches: number N of patches of an image.
        share: of the patches that are corrupted.
        masked: share of those that the mask embedding replaces.
        replaced: share of those that another patch's embedding replaces; the rest is left as it is.

    Returns:
        int64 [n, m, 2]: the m corrupted patches of each image, and the patch whose embedding each gets, or ``MASK``.
    """
    epochs = positions // (epoch_samples or sys.maxsize)
    prefix = hash_int(_CORRUPTION, seed)
    keys = hash_array(prefix, epochs[:, None], positions[:, None], np.arange(2 * patches))  # [n, 2 N]
    count = corrupted_patches(patches, share)
    where = np.argsort(keys[:, :patches], axis=1, kind="stable")[:, :count]  # [n, m]
    steps = np.take_along_axis(keys[:, patches:], where, axis=1) % np.uint64(max(patches - 1, 1))
    others = (where + 1 + steps.astype(np.int64)) % patches  # never itself, but where there is only one
    masks = round(masked * count)
    kept = masks + round(replaced * count)
    column = np.arange(count)
    source = np.where(column < masks, MASK, np.where(column < kept, others, where))
    return np.stack([where, source], axis=2)
