"""Which patches are corrupted in masked patch prediction, and how: keyed by seed, epoch and position."""

import sys

import numpy as np

from shards.hashing import hash_array, hash_int

# In place of the patch that another one's embedding is taken from:
MASK = -1  # the learned mask embedding
UNTOLD = -2  # its own, and the patch is not corrupted: where each is drawn for itself, some are listed that are not
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
    exact: bool = True,
    images: int = 1,
) -> np.ndarray:
    """Return what becomes of which patches (paper, appendix B.1.2): of one image the same on any number of ranks.

    The paper gives shares only; here every image has exactly those counts, rounded, or each patch is drawn for itself.
    A random other patch is one of the same image, if nothing else is asked for.

    Args:
        positions: int64 [n], global positions of the samples, as in ``Batch.positions``.
        epoch_samples: samples of an epoch; None: it never ends.
        seed: of the run.
        patches: number N of patches of an image.
        share: of the patches that are corrupted.
        masked: share of those that the mask embedding replaces.
        replaced: share of those that another patch's embedding replaces; the rest is left as it is.
        exact: whether the counts are, or each patch is drawn for itself.
        images: of how many a random other patch may be: its own and those that follow it in the batch, in a circle.

    Returns:
        int64 [n, m, 2]: the m corrupted patches of each image, and the patch whose embedding each gets, or ``MASK``;
        patch k of the j-th image after its own is j N + k. Drawn, all patches, those that are not corrupted with
        ``UNTOLD``.
    """
    epochs = positions // (epoch_samples or sys.maxsize)
    prefix = hash_int(_CORRUPTION, seed)
    keys = hash_array(prefix, epochs[:, None], positions[:, None], np.arange(2 * patches))  # [n, 2 N]
    fate: np.ndarray  # of each patch in its image: below the first of ``ends`` it is masked, and so on
    ends: tuple[float, ...]
    if exact:
        count = corrupted_patches(patches, share)
        where = np.argsort(keys[:, :patches], axis=1, kind="stable")[:, :count]  # [n, m]
        masks = round(masked * count)
        fate, ends = np.arange(count), (masks, masks + round(replaced * count), count)
    else:
        where = np.broadcast_to(np.arange(patches), (len(positions), patches))
        fate, ends = keys[:, :patches] * 2.0**-64, (masked * share, (masked + replaced) * share, share)
    steps = np.take_along_axis(keys[:, patches:], where, axis=1) % np.uint64(max(images * patches - 1, 1))
    others = (where + 1 + steps.astype(np.int64)) % (images * patches)  # never itself, but where there is only one
    choices = [np.full_like(where, MASK), others, where]
    source = np.select([np.broadcast_to(fate < end, where.shape) for end in ends], choices, UNTOLD)
    return np.stack([where, source], axis=2)
