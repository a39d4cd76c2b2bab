"""Mixup (arXiv:1710.09412): who is mixed with whom, and how much; a pure function of positions and a seed.

The partner of global position p is the one half a global batch away in the same batch. Rank r of R has the
positions ≡ r mod R, in their order; where 2R divides the batch, a row's partner is therefore on the same rank, half
its rows away: the pixels are mixed there, on the device, and nothing is sent.
"""

import numpy as np

from shards.augment import Key, draws
from shards.errors import UserError

_MIXUP = 6  # first word of its hashes; shards/hashing.py lists all


def partner_rows(rows: int) -> np.ndarray:
    """Return the row of each row's partner among a rank's rows of a global batch, int64 [rows].

    Raises:
        UserError: The rows are odd in number: twice the ranks do not divide the global batch.
    """
    if rows % 2:
        raise UserError(f"a rank has {rows} samples of a global batch; mixup pairs them, so give it an even number")
    return np.roll(np.arange(rows), rows // 2)


def mixup_weights(positions: np.ndarray, epoch_samples: int, seed: int, alpha: float) -> np.ndarray:
    """Return how much of itself each row keeps; the rest is its partner's.

    Partners have the same weight, drawn for the first position of the pair, with its epoch.

    Args:
        positions: int64 [n], a rank's positions of one global batch, as in ``Batch.positions``.
        epoch_samples: Samples of an epoch.
        seed: Of the run.
        alpha: Both parameters of the Beta distribution, above 0.

    Returns:
        float32 [n] in [0.5, 1].

    Raises:
        UserError: As ``partner_rows``.
    """
    first = np.minimum(positions, positions[partner_rows(len(positions))]).tolist()
    return np.array([pair_weight((seed, p // epoch_samples, p), alpha) for p in first], dtype=np.float32)


def pair_weight(key: Key, alpha: float) -> float:
    """Draw the greater of b and 1 - b for b from Beta(alpha, alpha), in 65536ths.

    Jöhnk's algorithm: of uniform u and v, x = u^(1/alpha) and y = v^(1/alpha) are tried until x + y ≤ 1; then
    x / (x + y) is Beta distributed. For alpha up to 1 that takes 2 tries at most on average. It is rounded, so that
    a machine whose powers differ in the last bit gives the same weight.
    """
    draw = draws(key, _MIXUP)
    while True:
        x, y = next(draw) ** (1 / alpha), next(draw) ** (1 / alpha)
        if 0 < x + y <= 1:
            return round(max(x, y) / (x + y) * 65536) / 65536
