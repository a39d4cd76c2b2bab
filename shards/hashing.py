"""One portable 64-bit hash: the only source of randomness of the order and the augmentation.

NumPy promises its bit streams, not its permutations, and a checkpoint must mean the same order in ten years.
The hash chains the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014) over its words, with integers and with arrays alike.
"""

import numpy as np

# Which word says what a hash is for, so that no two uses of a seed share their numbers. Take the next one; a word that
# is taken stays, since checkpoints and data sets mean the same order and the same pixels for ever.
#
# The first word, before the seed:
#   4 augmentation (shards/augment.py)        7, 8 tars and buffer of a stream (shards/stream.py)
#   5 RandAugment (shards/randaugment.py)     9    stochastic depth (pipeline/droppath.py)
#   6 mixup (shards/mixup.py)                 10   masked patch prediction (pipeline/corruption.py)
#   12 subsets of shards (shards/dataset.py)  11   masked autoencoding (pipeline/masking.py)
#   from 100 on: a user's own transforms
# The second word, after the seed:
#   1, 2 chunks and blocks of the order (shards/order.py)
#   3, 4 draws and seeds of the sources of a mixture (shards/mixedorder.py)
# Dropout's generators hash (seed, samples, rank, micro-batch), with no such word (pipeline/microbatch.py).

_MASK = (1 << 64) - 1
_STEP, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def hash_int(*words: int) -> int:
    """Hash integers (taken modulo 2**64) to an integer in [0, 2**64)."""
    h = 0
    for word in words:
        h = ((h ^ (word & _MASK)) + _STEP) & _MASK
        h = ((h ^ (h >> 30)) * _MUL1) & _MASK
        h = ((h ^ (h >> 27)) * _MUL2) & _MASK
        h ^= h >> 31
    return h


def hash_array(prefix: int, *words: np.ndarray) -> np.ndarray:
    """Go on from ``prefix = hash_int(...)`` with arrays of words, which broadcast; returns uint64.

    ``hash_array(hash_int(a), np.array([b]))[0] == hash_int(a, b)``.
    """
    h = np.full(1, prefix, dtype=np.uint64)
    for word in words:
        h = h ^ word.astype(np.uint64, copy=False)
        h += np.uint64(_STEP)
        h ^= h >> np.uint64(30)
        h *= np.uint64(_MUL1)
        h ^= h >> np.uint64(27)
        h *= np.uint64(_MUL2)
        h ^= h >> np.uint64(31)
    return h


_ID_BITS = np.uint64(0xFFFFFFFF)


def sort_keys(hashes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return uint64 keys whose plain sort is the stable argsort of the upper 32 bits of ``hashes``.

    The id (below 2**32) sits in the lower half, so ties fall in the order of the ids, and
    ``key.astype(uint32)`` of a sorted key is the id: a sort in place, without the memory and time of an
    argsort.
    """
    keys = hashes & ~_ID_BITS
    keys |= ids.astype(np.uint64, copy=False)
    return keys
