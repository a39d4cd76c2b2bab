"""Scores of predictions: accuracy, of ReaL labels too, class by class, who is taken for whom, and calibration.

An image with several labels is right if it is told as any of them, and one without labels is not counted: so ImageNet's
ReaL labels are scored ("Are we done with ImageNet?", arXiv 2006.07159).
"""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from pipeline.evaluate.classify import check_labelled, has_real_labels
from pipeline.evaluate.predict import Predictions
from pipeline.writable import writing
from shards.atomic import whole_file
from shards.dataset import Dataset
from shards.manylabels import stacked

REAL = "ReaL"
BINS = 15  # of confidence: as in "On Calibration of Modern Neural Networks" (arXiv 1706.04599)


class Scores:
    """Predictions beside what is true.

    Args:
        predictions: Of the images of a data set.
        dataset: With their labels.

    Raises:
        UserError: No image has a label.
    """

    def __init__(self, predictions: Predictions, dataset: Dataset):
        check_labelled(dataset)
        self._dataset, self._predictions = dataset, predictions
        shards = range(len(dataset.shard_sizes))
        self._labels: Sequence[tuple[int, ...]] = list(chain.from_iterable(dataset.rows(s).labels for s in shards))
        truth = stacked([(labels, ()) for labels in self._labels], "any")["label"]  # [n, m], -1 past the last
        self._labelled = truth[:, 0] >= 0
        right = (predictions.ranked[:, :, None] == truth[:, None]).any(axis=2)  # [n, k]
        self._right, self._right5 = right[:, 0], right.any(axis=1)

    def summary(self) -> dict[str, float | int | str]:
        """Return ``loss``, ``top1``, ``top5``, ``calibration_error``, all in [0, 1] but the first, and ``images``.

        ``unlabelled`` is there if some are not counted; ``labels`` is ``"ReaL"`` of ImageNet with such.
        """
        counted = self._labelled
        bins = self.calibration()
        weights = np.array(bins["images"]) / counted.sum()
        apart = np.abs(np.array(bins["confidence"]) - np.array(bins["top1"]))
        return {
            "loss": float(self._predictions.losses[counted].mean(dtype=np.float64)),
            "top1": float(self._right[counted].mean()),
            "top5": float(self._right5[counted].mean()),
            "images": int(counted.sum()),
            **({"unlabelled": int((~counted).sum())} if not counted.all() else {}),
            **({"labels": REAL} if has_real_labels(self._dataset) else {}),
            "calibration_error": float((weights * apart).sum()),
        }

    def predictions(self) -> pa.Table:
        """Return a row an image: ``key``, ``labels``, the best classes, their ``shares``, ``loss``, ``right``."""
        keys = list(chain.from_iterable(self._dataset.rows(s).key for s in range(len(self._dataset.shard_sizes))))
        ranked, shares, losses = self._predictions
        return pa.table({
            "key": keys,
            "labels": pa.array(self._labels, pa.list_(pa.int32())),
            "predicted": pa.array(list(ranked), pa.list_(pa.int32())),
            "shares": pa.array(list(shares), pa.list_(pa.float32())),
            "loss": pa.array(losses, pa.float32()),
            "right": pa.array(self._right, mask=~self._labelled),
        })  # fmt: skip

    def classes(self) -> pa.Table:
        """Return a row a class: its images, how many of them are right, the share; an image counts in each label."""
        who = np.repeat(np.arange(len(self._labels)), [len(labels) for labels in self._labels])
        which = np.fromiter(chain.from_iterable(self._labels), np.int64, len(who))
        number = len(self._dataset.classes)
        images = np.bincount(which, minlength=number)
        right = np.bincount(which[self._right[who]], minlength=number)
        share = np.divide(right, images, out=np.zeros(number), where=images > 0)
        return pa.table({
            "class": self._dataset.classes, "images": images, "right": right, "top1": pa.array(share, mask=images == 0),
        })  # fmt: skip

    def confusion(self) -> pa.Table:
        """Return who is taken for whom, most frequent first: ``is``, ``taken_for``, ``images``; of one label each."""
        number = len(self._dataset.classes)
        single = np.array([len(labels) == 1 for labels in self._labels])
        truth = np.array([labels[0] for labels in self._labels if len(labels) == 1], dtype=np.int64)
        cells, counts = np.unique(truth * number + self._predictions.ranked[single, 0], return_counts=True)
        order = np.lexsort((cells, -counts))
        names = np.array(self._dataset.classes, dtype=object)
        return pa.table({
            "is": names[cells[order] // number], "taken_for": names[cells[order] % number], "images": counts[order],
        })  # fmt: skip

    def calibration(self) -> pa.Table:
        """Return a row a bin of confidence that has images: their number, mean confidence and accuracy."""
        confidence, right = self._predictions.shares[self._labelled, 0].astype(np.float64), self._right[self._labelled]
        place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/15], (1/15, 2/15] ...
        images = np.bincount(place, minlength=BINS)
        some = images > 0
        sums = [np.bincount(place, weights, BINS)[some] / images[some] for weights in (confidence, right)]
        low = np.arange(BINS)[some] / BINS
        return pa.table({
            "above": low, "up_to": low + 1 / BINS, "images": images[some], "confidence": sums[0], "top1": sums[1],
        })  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write ``predictions.parquet``, ``classes.csv``, ``confusion.csv`` and ``calibration.csv`` into a folder.

        Raises:
            UserError: It cannot be written, or its disk is full.
        """
        with writing(folder):
            self._write(folder / "predictions.parquet", self.predictions(), pq.write_table)
            for name in ("classes", "confusion", "calibration"):
                self._write(folder / f"{name}.csv", getattr(self, name)(), csv.write_csv)

    @staticmethod
    def _write(path: Path, table: pa.Table, write: Callable[[pa.Table, Path], None]) -> None:
        with whole_file(path) as partial:
            write(table, partial)
