"""Top-1, top-5 and loss over a whole data set: every image exactly once, on any number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.evaluate.held_out import mean_over
from pipeline.images import to_model_input
from pipeline.losses import class_losses, class_targets
from pipeline.models import Model
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
    check_labelled(dataset)
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
    mean, top1, top5 = (each / share for each in sums)
    return {"loss": mean, "top1": top1, "top5": top5, "images": round(images * share)}


def check_labelled(dataset: Dataset) -> None:
    """Raise a UserError when no image of a data set has a label; its tables are read up to the first that has one."""
    if not any(any(dataset.rows(shard).labels) for shard in range(len(dataset.shard_sizes))):
        raise UserError(f"no image of {dataset.url} has a label; there is nothing to score")


def has_real_labels(dataset: Dataset) -> bool:
    """Tell whether a data set is of ImageNet's validation images with ReaL labels, of which an image has any number."""
    return dataset.build.get("source") == "imagenet" and dataset.build.get("multi_label", False)


def check_classes(model: Model, classes: list[str], dataset: Dataset) -> None:
    """Raise a UserError when a model's classes are not those of a data set."""
    check_known_classes(model.num_classes, classes, dataset)


def check_known_classes(number: int, classes: list[str], dataset: Dataset) -> None:
    """Raise a UserError when a number of classes and their names, of a model, are not those of a data set."""
    if not number:
        raise UserError(
            "the model has no head of classes; fine-tune it, or see what its features are worth: `patchmill fewshot`"
        )
    if not classes:
        raise UserError(
            "the model does not know the names of its classes; write them into a file, a line each in the order of its "
            "head's outputs, and give it to `patchmill convert` with --classes FILE"
        )
    if classes != dataset.classes:
        raise UserError(
            f"the model knows {_some(classes)}, {dataset.url} has {_some(dataset.classes)}; evaluate on the data it "
            "was trained for, or one built with the same list of classes"
        )


def _some(classes: list[str]) -> str:
    """Return how many classes there are, and the first of them."""
    return f"{len(classes)} classes ({', '.join([*classes[:3], *['...'] * (len(classes) > 3)])})"
