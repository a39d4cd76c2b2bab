"""What frozen features are worth: closed-form accuracy on few and on all training images, next to raw pixels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from pipeline import distributed
from pipeline.evaluate.fewshot import fewshot_accuracy, least_squares_accuracy
from pipeline.images import to_model_input
from shards.augment import Resize
from shards.dataset import Dataset
from shards.errors import UserError
from shards.evaluation import EvaluationLoader

BATCH = 64


def frozen_features_accuracy(model: nn.Module, train: Dataset, test: Dataset, shots: Sequence[int]) -> dict[str, dict]:
    """Fit linear classifiers on training images, score them on test images (vit-paper 4).

    Returns:
        For ``features`` (before the head) and ``pixels`` (the same images, flattened): ``shots`` (mean top-1 over three
        seeds, by number of shots), ``all`` (top-1 of least squares on every training image) and its ``l2``.
    """
    if train.classes != test.classes:
        raise UserError(f"{test.url} has other classes than {train.url}; build both with one command")
    model = model.to(distributed.device())
    train_pixels, train_features, train_labels = _extract(model, train)
    test_pixels, test_features, test_labels = _extract(model, test)
    result = {}
    for name, x, y in (("features", train_features, test_features), ("pixels", train_pixels, test_pixels)):
        few = {str(n): float(np.mean(fewshot_accuracy(x, train_labels, y, test_labels, n))) for n in shots}
        accuracy, l2 = least_squares_accuracy(x, train_labels, y, test_labels)
        result[name] = {"shots": few, "all": accuracy, "l2": l2}
    return result


@torch.no_grad()
def _extract(model: nn.Module, dataset: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return pixels [n, 3*H*W], features [n, D] (float32) and labels [n] of every image."""
    pixels, features, labels = [], [], []
    for batch in EvaluationLoader(dataset, BATCH, transform=Resize(model.image_size)):
        images = to_model_input(batch.images[batch.valid], distributed.device())
        pixels.append(images.flatten(1).cpu().numpy())
        features.append(model.features(images).cpu().numpy())
        labels.append(batch.labels[batch.valid])
    return np.concatenate(pixels), np.concatenate(features), np.concatenate(labels)
