"""What a run measures between two log lines: speed, loss and what the loader did, over all ranks."""

import time
from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

from pipeline import distributed
from pipeline.config import TrainSettings
from shards.loader import Loader
from shards.meter import Counts
from shards.processloader import ProcessLoader
from shards.stream import StreamLoader

T = TypeVar("T")


class Window:
    """The steps since the last log line.

    Args:
        settings: Of the stage.
        loader: Whose counts are read.

    Attributes:
        images: Trained on in all windows that were measured, over all ranks.
        seconds: That those windows took.
    """

    def __init__(self, settings: TrainSettings, loader: Loader | ProcessLoader | StreamLoader):
        self.images, self.seconds = 0, 0.0
        self._settings, self._loader = settings, loader
        self.open()

    def open(self) -> None:
        """Begin a window."""
        self._loss, self._steps, self._waited = 0.0, 0, 0.0
        self._before, self._began = self._loader.counts(), time.monotonic()

    def next(self, batches: Iterator[T]) -> T | None:
        """Return the next batch, None after the last; the time until it is there is time that the model waits."""
        began = time.monotonic()
        batch = next(batches, None)
        self._waited += time.monotonic() - began
        return batch

    def add(self, loss: float | Tensor) -> None:
        """Count a step with its mean loss over all ranks; a tensor stays on its device."""
        self._loss, self._steps = self._loss + loss, self._steps + 1

    def measure(self, asked: bool) -> tuple[dict[str, float], bool]:
        """Measure the window; collective over all ranks.

        Args:
            asked: This rank was asked to stop; here, so that one sum over the ranks does for all.

        Returns:
            The values of a log line, and whether any rank was asked to stop. Shares are of the time of all ranks, those
            of reading and decoding of the time of all their decode threads; the last counts are since the run started.
        """
        loss = float(self._loss)  # waits for the device: whatever is decoded meanwhile belongs to the window
        mine = [self._waited, float(asked), *self._loader.counts(), *self._before]
        waited, stopping, *counts = distributed.sum_over_ranks(mine)
        now, before = Counts(*counts[: len(counts) // 2]), Counts(*counts[len(counts) // 2 :])
        here = Counts(*(after - earlier for after, earlier in zip(now, before, strict=True)))
        seconds, ranks = time.monotonic() - self._began, distributed.world_size()
        threads, asked_for = ranks * self._settings.data.threads, here.cache_hits + here.cache_misses
        images = self._steps * self._settings.global_batch
        self.images, self.seconds = self.images + images, self.seconds + seconds
        return {
            "loss": loss / self._steps,
            "images_per_second": images / seconds, "mb_per_second": here.bytes / 1e6 / seconds,
            "data_wait": waited / ranks / seconds, "read_share": here.read_seconds / threads / seconds,
            "decode_share": here.decode_seconds / threads / seconds,
            **({"cache_hit_share": here.cache_hits / asked_for} if asked_for else {}),
            "retries": int(now.retries), "replaced": int(now.replaced), "quarantined": int(now.quarantined),
        }, stopping > 0  # fmt: skip
