"""Probes of frozen features while a model trains: few-shot least squares, and linear probing on all samples.

Each rank extracts the features of its share of the images and keeps them; what a fit needs of the others' is summed.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.evaluate.fewshot import check_shots, draw_shots, fit
from pipeline.evaluate.frozen import SEEDS, single_labels
from pipeline.evaluate.linear import linear_accuracy
from pipeline.images import to_model_input
from pipeline.prefetch import prefetched
from pipeline.telemetry import Telemetry
from shards.augment import TRANSFORMS
from shards.dataset import Dataset
from shards.errors import UserError
from shards.evaluation import EvaluationBatch, EvaluationLoader


class Features(NamedTuple):
    """Frozen features of this rank's images: float32 [n, D], labels and places in the data set int64 [n], ascending."""

    values: Tensor
    labels: Tensor
    places: Tensor


class Probe:
    """The probes of a stage.

    Args:
        settings: Of the stage, with a ``probe``.

    Raises:
        UserError: A data set is not there, an image has not exactly one label, the two have not the same classes, or
            one of them has too few images for the shots.
    """

    def __init__(self, settings: TrainSettings):
        assert settings.probe is not None
        self._settings, self._probe = settings, settings.probe
        opened = (Dataset.open(url, settings=settings.data.store) for url in (self._probe.train, self._probe.test))
        self._train, self._test = opened
        if self._train.classes != self._test.classes:
            raise UserError(
                f"{self._test.url} has other classes than {self._train.url}; build both with one list of classes"
            )
        self._labels, _ = (single_labels(dataset) for dataset in (self._train, self._test))
        if self._probe.fewshot:
            check_shots(self._labels, len(self._train.classes), max(self._probe.shots), self._train.classes)

    def measure(self, model: nn.Module, samples: int, telemetry: Telemetry | None) -> dict[str, float]:
        """Return and log top-1 on the test set by probe: ``probe_5shot``, ``probe_linear``; collective over all ranks.

        Args:
            model: ``model(images, features=True)`` gives the features, [n, D].
            samples: Consumed.
            telemetry: Of rank 0.
        """
        model.eval()
        train, test = (self._extract(model, dataset) for dataset in (self._train, self._test))
        classes = len(self._train.classes)
        found: dict[str, float] = {}
        if self._probe.fewshot:
            found |= {f"probe_{shots}shot": self._few(train, test, shots) for shots in self._probe.shots}
        if self._probe.linear:
            found["probe_linear"] = linear_accuracy(train.values, train.labels, test.values, test.labels, classes)
        if telemetry:
            telemetry.log(samples, found)
        return found

    def _few(self, train: Features, test: Features, shots: int) -> float:
        """Return the mean accuracy of fits to so many samples a class (vit-paper 4)."""
        right = 0.0
        for seed in SEEDS:
            chosen = draw_shots(self._labels, len(self._train.classes), shots, seed)
            classifier = fit(_rows(train, chosen), self._labels[chosen], len(self._train.classes))
            if len(test.labels):  # of a small set, a rank may have none
                right += classifier.accuracy(test.values.numpy(), test.labels.numpy()) * len(test.labels)
        return distributed.sum_over_ranks([right])[0] / len(SEEDS) / len(self._test)

    @torch.no_grad()
    def _extract(self, model: nn.Module, dataset: Dataset) -> Features:
        data, evaluate, device = self._settings.data, self._settings.evaluate, distributed.device()
        parts = EvaluationLoader(
            dataset, evaluate.batch, transform=TRANSFORMS[self._probe.view](data.resolution), rank=distributed.rank(),
            world_size=distributed.world_size(), threads=data.threads,
        )  # fmt: skip

        def prepare(part: EvaluationBatch) -> tuple[Tensor, ...]:
            return to_model_input(part.images, device), *(torch.from_numpy(each).to(device) for each in part[1:])

        found = []
        for images, *rest, valid in prefetched(iter(parts), prepare, device):
            values = model(images, features=True).float()
            found.append(Features(*(each[valid].cpu() for each in (values, *rest))))
        return Features(*(torch.cat(each) for each in zip(*found, strict=True)))


def _rows(features: Features, places: np.ndarray) -> np.ndarray:
    """Return the features at some places of the data set, float32 [len(places), D], whichever ranks have them."""
    wanted = torch.from_numpy(places)
    rows = torch.zeros(len(places), features.values.shape[1], device=distributed.device())
    mine = torch.isin(wanted, features.places)
    found = torch.searchsorted(features.places, wanted[mine])
    rows[mine.to(rows.device)] = features.values[found].to(rows.device)
    torch.distributed.all_reduce(rows)  # the others have zeros there
    return rows.cpu().numpy()
