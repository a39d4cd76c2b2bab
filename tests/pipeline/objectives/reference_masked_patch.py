"""Masked patch prediction in plain NumPy, written from the paper's appendix B.1.2 and nothing else of ours."""

import numpy as np


def mean_colors(image: np.ndarray, grid: int, parts: int) -> np.ndarray:
    """Return the 3-bit mean colours of uint8 [H, W, 3], int [grid * grid, parts * parts], patch by patch."""
    side = image.shape[0] // grid // parts
    found = []
    for row in range(grid):
        for column in range(grid):
            for y in range(parts):
                for x in range(parts):
                    top, left = (row * parts + y) * side, (column * parts + x) * side
                    mean = image[top : top + side, left : left + side].reshape(-1, 3).astype(float).mean(axis=0)
                    red, green, blue = np.floor(mean * 8 / 256).astype(int)
                    found.append(64 * red + 8 * green + blue)
    return np.array(found).reshape(grid**2, parts**2)


def cross_entropy(logits: np.ndarray, target: int) -> float:
    """Return -log softmax(logits)[target] of float [512]."""
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])
