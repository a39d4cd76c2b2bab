"""Supervised classification: softmax cross-entropy, or sigmoid cross-entropy summed over classes (vit-paper 2.3)."""

from collections.abc import Callable

import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from pipeline.config import TrainSettings


def supervised_loss(settings: TrainSettings, num_classes: int) -> Callable[[Callable, tuple[Tensor, Tensor]], Tensor]:
    """Return ``loss(model, (images, labels)) -> mean loss``, a float32 scalar.

    Images are float [n, 3, H, W]; labels are class indices, int64 [n], or shares of the classes, float32 [n, K].
    """

    def loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        logits = model(images).float()  # [n, K]
        if settings.loss == "softmax":
            return F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        targets = labels if labels.is_floating_point() else F.one_hot(labels, num_classes).float()
        targets = targets * (1 - settings.label_smoothing) + settings.label_smoothing / num_classes
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()

    return loss
