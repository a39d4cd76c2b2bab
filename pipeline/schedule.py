"""Learning rates as functions of samples seen (vit-paper 2.2, the official code's formula)."""

import math


def learning_rate(seen: int, *, shape: str, base: float, end: float, warmup: int, total: int) -> float:
    """Return the learning rate of the step that ends at ``seen`` samples.

    Args:
        seen: Samples consumed when the step is over, so the first step's rate is not zero.
        shape: ``"linear"`` or ``"cosine"`` decay.
        base: Peak learning rate.
        end: Rate at ``total``.
        warmup: Samples of linear warm-up from zero.
        total: Samples of the whole run.
    """
    done = min(1.0, max(0.0, (seen - warmup) / max(1, total - warmup)))
    if shape == "linear":
        rate = end + (base - end) * (1.0 - done)
    else:
        rate = end + (base - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    return rate * min(1.0, seen / warmup) if warmup else rate
