"""Supervised classification: softmax cross-entropy, or sigmoid cross-entropy summed over classes (vit-paper 2.3)."""

from collections.abc import Callable

from torch import Tensor

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.evaluate.classify import classify
from pipeline.images import training_input
from pipeline.losses import class_losses
from shards.augment import TRANSFORMS
from shards.batch import Batch
from shards.dataset import Dataset


class Supervised:
    """The objective of stages of kind ``supervised`` and ``finetune``.

    Args:
        settings: Of the stage.
        epoch: Samples of an epoch; None: nobody knows.
        num_classes: Of the labels, K.
    """

    def __init__(self, settings: TrainSettings, epoch: int | None, num_classes: int):
        self._settings, self._epoch, self._num_classes = settings, epoch, num_classes

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images and labels as ``training_input`` makes them."""
        return training_input(batch, self._settings, self._epoch, self._num_classes, distributed.device())

    def loss(self, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss, a float32 scalar.

        Images are float [n, 3, H, W]; labels are class indices, int64 [n], or shares of the classes, float32 [n, K].
        """
        return class_losses(model(images), labels, self._settings.loss, self._settings.label_smoothing).mean()

    def evaluate(self, model: Callable[[Tensor], Tensor], dataset: Dataset) -> dict[str, float]:
        """Return what ``classify`` says of a held-out set, by the stage's own loss; collective over all ranks."""
        data, evaluate, loss = self._settings.data, self._settings.evaluate, self._settings.loss
        transform = TRANSFORMS[evaluate.view](data.resolution)
        return classify(model, dataset, transform, evaluate.batch, data.threads, loss)

    @staticmethod
    def better(val: dict[str, float], best: dict[str, float]) -> bool:
        """Tell whether one evaluation beats another."""
        return val["top1"] > best["top1"]
