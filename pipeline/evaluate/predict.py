"""What a model says of every image of a data set: each once, in their order, on any number of ranks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.evaluate.held_out import each_batch
from pipeline.images import to_model_input
from pipeline.losses import class_losses, class_targets
from shards.augment import Transform
from shards.dataset import Dataset
from shards.evaluation import EvaluationBatch

TOP = 5


class Predictions(NamedTuple):
    """Of the n images of a data set, in its order.

    Attributes:
        ranked: int64 [n, k], the classes that got most, at most five, the first one first.
        shares: float32 [n, k], their softmax, of all classes.
        losses: float32 [n], cross-entropy; of an image without labels 0.
    """

    ranked: np.ndarray
    shares: np.ndarray
    losses: np.ndarray


@torch.no_grad()
def predict(
    model: Callable[[Tensor], Tensor], dataset: Dataset, transform: Transform, batch: int, threads: int = 2
) -> Predictions:
    """Return what ``model(images [n,3,H,W]) -> logits [n,K]`` says of every image; collective, the same on all ranks.

    Args:
        model: In evaluation mode.
        dataset: Images with no, one or several labels.
        transform: Makes of an image the square that the model sees.
        batch: Images a rank takes at once.
        threads: Decode threads.
    """
    device = distributed.device()

    def prepare(part: EvaluationBatch) -> tuple[Tensor, ...]:
        return to_model_input(part.images, device), class_targets(part, len(dataset.classes), "softmax", device)

    found = []
    for images, targets, where, valid in each_batch(dataset, transform, batch, threads, prepare):
        logits = model(images).float()  # [n, K]
        shares, ranked = logits.softmax(dim=1).topk(min(TOP, logits.shape[1]), dim=1)
        losses = class_losses(logits, targets, "softmax")
        found.append([each[valid].cpu().numpy() for each in (where, ranked, shares, losses)])
    mine = [np.concatenate(each) for each in zip(*found, strict=True)]
    places, *values = (np.concatenate(each) for each in zip(*distributed.everyone(mine), strict=True))
    order = np.argsort(places)
    return Predictions(*(each[order] for each in values))
