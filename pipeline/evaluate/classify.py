"""Top-1, top-5 and loss over a whole data set: every image exactly once, on any number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.evaluate.held_out import mean_over
from pipeline.images import to_model_input
from pipeline.losses import class_losses, class_targets
from shards.augment import TRANSFORMS
from shards.dataset import Dataset
from shards.errors import UserError
from shards.evaluation import EvaluationBatch


def classify(
    model: Callable[[Tensor], Tensor],
    dataset: Dataset,
    resolution: int,
    batch: int,
    threads: int = 2,
    view: str = "resize",
    loss: str = "softmax",
) -> dict:
    """Evaluate ``model(images [n,3,H,W]) -> logits [n,K]`` on every image of ``dataset``; collective over all ranks.

    Args:
        model: In evaluation mode.
        dataset: Images with one label or several; of several, each is right.
        resolution: Side of what the model sees.
        batch: Images a rank takes at once; the padding of the last batch is left out of all sums.
        threads: Decode threads.
        view: ``"resize"``: all of the image, straight to the square (vit-paper 8); ``"center_crop"``: its middle.
        loss: ``"softmax"`` or ``"sigmoid"`` cross-entropy.

    Returns:
        ``loss``, ``top1``, ``top5`` in [0, 1], ``images`` counted over all ranks.
    """
    device = distributed.device()

    def prepare(part: EvaluationBatch) -> tuple[Tensor, ...]:
        labels = torch.from_numpy(part.labels["label"].copy()).to(device)  # [n, m], -1 past the last
        return to_model_input(part.images, device), labels, class_targets(part, len(dataset.classes), loss, device)

    def measure(images: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        logits = model(images).float()  # [n, K]
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [n, 5]
        right = (ranked[:, :, None] == labels[:, None]).any(dim=2)
        return torch.stack([class_losses(logits, targets, loss), right[:, 0], right.any(dim=1)], dim=1)

    transform = TRANSFORMS[view](resolution)
    (mean, top1, top5), images = mean_over(dataset, transform, batch, threads, prepare, measure, labels="some")
    return {"loss": mean, "top1": top1, "top5": top5, "images": images}


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
