"""Layers of ResNets in NumPy and float64, straight from their definitions: what the models are compared with."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Sides = tuple[int, int]


def conv(x: np.ndarray, kernel: np.ndarray, stride: int = 1, pad: Sides = (0, 0)) -> np.ndarray:
    """Correlate x [C, H, W] with a kernel [C', C, k, k], after ``pad`` zeros (before, after) on both axes."""
    x = np.pad(x, ((0, 0), pad, pad))
    windows = sliding_window_view(x, kernel.shape[2:], axis=(1, 2))[:, ::stride, ::stride]  # [C, H', W', k, k]
    return np.einsum("chwij,dcij->dhw", windows, kernel, optimize=True)


def max_pool(x: np.ndarray, size: int, stride: int, pad: Sides, value: float) -> np.ndarray:
    """Return the largest of each window of x [C, H, W], after padding with ``value``."""
    x = np.pad(x, ((0, 0), pad, pad), constant_values=value)
    return sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride].max((3, 4))


def group_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """Bring each of 32 groups of neighbouring channels of x [C, H, W] to mean 0 and variance 1, then scale."""
    groups = x.reshape(32, -1)
    groups = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + eps)
    return groups.reshape(x.shape) * gain[:, None, None] + bias[:, None, None]


def same(size: int, kernel: int, stride: int) -> Sides:
    """Return TensorFlow's SAME padding: as many outputs as size / stride rounded up, the odd pixel at the end."""
    outputs = (size + stride - 1) // stride
    total = max((outputs - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
