"""What a model says of every image of a data set: each once, in their order, on any number of ranks."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.images import to_model_input
from pipeline.losses import class_losses, class_targets
from pipeline.prefetch import prefetched
from shards.augment import TRANSFORMS
from shards.dataset import Dataset
from shards.evaluation import EvaluationBatch, EvaluationLoader

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
    model: Callable[[Tensor], Tensor],
    dataset: Dataset,
    resolution: int,
    batch: int,
    threads: int = 2,
    view: str = "resize",
) -> Predictions:
    """Return what ``model(images [n,3,H,W]) -> logits [n,K]`` says of every image; collective, the same on all ranks.

    Args:
        model: In evaluation mode.
        dataset: Images with no, one or several labels.
        resolution: Side of what the model sees.
        batch: Images a rank takes at once.
        threads: Decode threads.
        view: ``"resize"``: all of the image, straight to the square (vit-paper 8); ``"center_crop"``: its middle.
    """
    device = distributed.device()
    parts = EvaluationLoader(
        dataset, batch, transform=TRANSFORMS[view](resolution), rank=distributed.rank(),
        world_size=distributed.world_size(), threads=threads, labels="any",
    )  # fmt: skip

    def prepare(part: EvaluationBatch) -> tuple[Tensor, ...]:
        targets = class_targets(part, len(dataset.classes), "softmax", device)
        return (
            to_model_input(part.images, device),
            targets,
            torch.from_numpy(part.positions),
            torch.from_numpy(part.valid),
        )

    found = []
    for images, targets, places, valid in prefetched(iter(parts), prepare, device):
        logits = model(images).float()  # [n, K]
        shares, ranked = logits.softmax(dim=1).topk(min(TOP, logits.shape[1]), dim=1)
        losses = class_losses(logits, targets, "softmax")
        found.append([each[valid].numpy() for each in (places, ranked.cpu(), shares.cpu(), losses.cpu())])
    mine = [np.concatenate(each) for each in zip(*found, strict=True)]
    places, *values = (np.concatenate(each) for each in zip(*distributed.everyone(mine), strict=True))
    order = np.argsort(places)
    return Predictions(*(each[order] for each in values))
