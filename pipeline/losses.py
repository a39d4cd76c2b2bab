"""Losses of class logits, image by image (vit-paper 2.3), and the targets that labels are to them."""

import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from shards.batch import Batch
from shards.evaluation import EvaluationBatch
from shards.manylabels import LABEL


def class_losses(logits: Tensor, targets: Tensor, kind: str, smoothing: float = 0.0) -> Tensor:
    """Return the loss of each image, float32 [n].

    Args:
        logits: [n, K].
        targets: class indices, int64 [n], or shares of the classes, float32 [n, K].
        kind: "softmax" cross-entropy, or "sigmoid" cross-entropy summed over the classes.
        smoothing: share of the target that is spread over all classes.
    """
    logits, classes = logits.float(), logits.shape[1]
    if kind == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
    targets = targets if targets.is_floating_point() else F.one_hot(targets, classes).float()
    targets = targets * (1 - smoothing) + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1)


def class_targets(batch: Batch | EvaluationBatch, classes: int, kind: str, device: torch.device) -> Tensor:
    """Return what the labels of a batch are to a loss, on the device.

    Of several labels of an image each has its weight as target of its sigmoid; a softmax, whose shares sum to 1, gives
    each its share of the weights. An image without labels is no class to a sigmoid, and nothing to a softmax.

    Args:
        batch: Of host memory.
        classes: Their number K.
        kind: Of the loss, as in ``class_losses``.
        device: Of the model.

    Returns:
        Class indices, int64 [n], where each image has one label of weight 1; else float32 [n, K].
    """
    labels = batch.labels
    if labels.dtype != LABEL:
        return torch.from_numpy(labels).to(device)
    # Copied, since of a single label NumPy calls the field's stride contiguous, and torch takes none of that kind.
    labels, weights = (labels[field].copy() for field in ("label", "weight"))
    if labels.shape[1] == 1 and (weights == 1).all():
        return torch.from_numpy(labels[:, 0]).to(device)
    if kind == "softmax":
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / (total + (total == 0))
    where, shares = (torch.from_numpy(each).to(device) for each in (labels, weights))
    # Past an image's last label stands -1 with the weight 0.
    return torch.zeros(len(where), classes, device=device).scatter_add_(1, where.clamp(min=0), shares)
