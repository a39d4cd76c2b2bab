"""Nearest neighbours of frozen features: they vote, by cosine, with exp(similarity / 0.07).

Source: "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978, section 3.4); DINO
and others report the same.
"""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

TEMPERATURE = 0.07
TRAIN_AT_ONCE, TEST_AT_ONCE = 16_384, 1_024


def knn_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, k: int, device: torch.device
) -> float:
    """Return the share of test samples that the weighted vote of their k nearest training samples gets right.

    Args:
        train: float32 [n, D]; may be a file, it is read some samples at a time.
        train_labels: int64 [n].
        test: float32 [m, D], likewise.
        test_labels: int64 [m].
        k: Neighbours; all, if there are no more.
        device: To compute on.
    """
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    truth, k, right = torch.from_numpy(test_labels).to(device), min(k, len(train)), 0
    for start in range(0, len(test), TEST_AT_ONCE):
        queries = _directions(test[start : start + TEST_AT_ONCE], device)  # [b, D]
        near, labels = _nearest(queries, train, train_labels, k)  # each [b, k]
        votes = torch.zeros(len(queries), classes, device=device).scatter_add_(1, labels, (near / TEMPERATURE).exp())
        right += int((votes.argmax(1) == truth[start : start + len(queries)]).sum())
    return right / len(test)


def _nearest(queries: Tensor, train: np.ndarray, train_labels: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    near = queries.new_empty(len(queries), 0)
    labels = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), TRAIN_AT_ONCE):
        part = _directions(train[start : start + TRAIN_AT_ONCE], queries.device)
        own = torch.from_numpy(train_labels[start : start + TRAIN_AT_ONCE]).to(queries.device)
        near = torch.cat([near, queries @ part.T], dim=1)
        labels = torch.cat([labels, own.expand(len(queries), -1)], dim=1)
        near, places = near.topk(min(k, near.shape[1]), dim=1)
        labels = labels.gather(1, places)
    return near, labels


def _directions(features: np.ndarray, device: torch.device) -> Tensor:
    return F.normalize(torch.from_numpy(np.array(features)).to(device).float(), dim=1)
