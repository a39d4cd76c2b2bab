"""Top-1, top-5 and loss over a whole data set: every image exactly once, on any number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.evaluate.held_out import mean_over
from pipeline.images import to_model_input
from pipeline.losses import class_losses, class_targets
from shards.augment import Transform
from shards.dataset import Dataset
from shards.errors import UserError
from shards.evaluation import EvaluationBatch


def classify(
    model: Callable[[Tensor], Tensor],
    dataset: Dataset,
    transform: Transform,
    batch: int,
    threads: int = 2,
    loss: str = "softmax",
) -> dict:
    """Return means over every image of a data set, as ``predict`` sees them; collective over all ranks.

    Args: As of ``predict``, and
        loss: ``"softmax"`` or ``"sigmoid"`` cross-entropy.

    Returns:
        ``loss``, ``top1``, ``top5`` in [0, 1], where of several labels each is right, and ``images``: those that have
        a label, over all ranks; the others are not counted.

    Raises:
        UserError: No image has a label.
    """
    device = distributed.device()

    def prepare(part: EvaluationBatch) -> tuple[Tensor, ...]:
        labels = torch.from_numpy(part.labels["label"].copy()).to(device)  # [n, m], -1 past the last
        return to_model_input(part.images, device), labels, class_targets(part, len(dataset.classes), loss, device)

    def measure(images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        logits = model(images).float()  # [n, K]
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [n, 5]
        right = (ranked[:, :, None] == labels[:, None]).any(dim=2)
        labelled = labels[:, 0] >= 0
        found = [class_losses(logits, targets, loss), right[:, 0], right.any(dim=1), labelled]
        return torch.stack(found, dim=1) * labelled[:, None]

    (*sums, share), images = mean_over(dataset, transform, batch, threads, prepare, measure)
    if not share:
        raise UserError(f"no image of {dataset.url} has a label; there is nothing to score")
    mean, top1, top5 = (each / share for each in sums)
    return {"loss": mean, "top1": top1, "top5": top5, "images": round(images * share)}


def check_classes(classes: list[str], dataset: Dataset) -> None:
    """Raise a UserError when a model's classes are not those of a data set."""
    if not classes:
        raise UserError(
            "the model does not know the names of its classes; write them into a file, a line each in the order of its "
            "head's outputs, and give it to `patchmill convert` with --classes FILE"
        )
    if classes != dataset.classes:
        raise UserError(
            f"the model knows {len(classes)} classes ({', '.join(classes[:3])} ...), {dataset.url} has "
            f"{len(dataset.classes)} ({', '.join(dataset.classes[:3])} ...); evaluate on the data it was trained for"
        )
