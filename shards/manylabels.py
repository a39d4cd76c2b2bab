"""How many labels a sample of a batch may have, and how those of several samples are one array."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Accepts = Literal["one", "some", "any"]
"""Labels a sample: exactly one, at least one, or any number."""

Labels = tuple[tuple[int, ...], tuple[float, ...]]
"""The class indices of a sample and their weights; no weights: all are 1."""

NONE: Labels = ((), ())

LABEL = np.dtype([("label", np.int64), ("weight", np.float32)])
"""An element of the labels of samples that may have several."""


def refusal(number: int, accepts: Accepts) -> str:
    """Return what is wrong with so many labels of one sample; nothing if nothing is."""
    if accepts == "one" and number != 1:
        return f"{number} labels, one is needed"
    return "no label, at least one is needed" if accepts == "some" and not number else ""


def stacked(found: Sequence[Labels], accepts: Accepts) -> np.ndarray:
    """Return the labels of n samples.

    Returns:
        Of exactly one label each: int64 [n], 0 where there is none. Else ``LABEL`` [n, m], where m is the most that one
        has, or 1; past a sample's last stands -1 with the weight 0.
    """
    if accepts == "one":
        return np.array([labels[0] if labels else 0 for labels, _ in found], dtype=np.int64)
    together = np.full((len(found), max([1, *(len(labels) for labels, _ in found)])), -1, dtype=LABEL)
    together["weight"] = 0
    for row, (labels, weights) in enumerate(found):
        together["label"][row, : len(labels)] = labels
        together["weight"][row, : len(labels)] = weights or 1
    return together
