"""What a run measures between two log lines: speed, loss and what the loader did, over all ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines.fragments import Step
from pipeline.stopwatch import Mark, mark, seconds_between
from shards.loader import Loader
from shards.meter import Counts
from shards.processloader import ProcessLoader
from shards.stream import StreamLoader

T = TypeVar("T")
PERCENTILES = {"median": 50, "p95": 95, "max": 100}


class Taken(NamedTuple):
    """A step on the host.

    Attributes:
        samples: Consumed at its end.
        loss: Mean over the global batch.
        grad_norm: Before clipping.
        applied: It was not held back.
    """

    samples: int
    loss: float
    grad_norm: float
    applied: bool


class Window:
    """The steps since the last log line.

    Args:
        settings: Of the stage.
        loader: Whose counts are read.
        sample_seconds: What training on a sample takes at the least, were all of it matrix products on all ranks.

    Attributes:
        images: Trained on in all windows that were measured, over all ranks.
        seconds: That those windows took.
    """

    def __init__(self, settings: TrainSettings, loader: Loader | ProcessLoader | StreamLoader, sample_seconds: float):
        self.images, self.seconds = 0, 0.0
        self._settings, self._loader, self._sample_seconds = settings, loader, sample_seconds
        self.open()

    def open(self) -> None:
        """Begin a window."""
        self._steps: list[tuple[int, Step]] = []
        self._waited, self._passes = 0.0, []
        self._marks: list[Mark] = [mark()]
        self._before, self._began = self._loader.counts(), time.monotonic()

    def next(self, batches: Iterator[T]) -> T | None:
        """Return the next batch, None after the last; the time until it is there is time that the model waits."""
        began = time.monotonic()
        batch = next(batches, None)
        self._waited += time.monotonic() - began
        return batch

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Time a forward pass: except under ZeRO 3, what a rank does before it waits for others."""
        began = mark()
        yield
        self._passes.append((began, mark()))

    def add(self, samples: int, step: Step) -> None:
        """Count the step that ended at so many samples; its tensors stay on their device."""
        self._steps.append((samples, step))
        self._marks.append(mark())

    def measure(self, asked: bool) -> tuple[list[Taken], dict[str, float | int | None], bool]:
        """Measure the window; collective over all ranks.

        Args:
            asked: This rank was asked to stop; here, so that one exchange between the ranks does for all.

        Returns:
            The steps; the values of a log line; and whether any rank was asked to stop. Shares are of the time of all
            ranks, those of reading and decoding of the time of all their decode threads; the last counts are since the
            run started. Loss and gradient norm are of the steps that were not held back, None if all were.
        """
        taken = self._on_host()  # waits for the device: whatever is decoded meanwhile belongs to the window
        # Under ZeRO 3 a forward pass waits for others, for the weights that they hold.
        passes = [] if self._settings.engine.zero_stage == 3 else self._passes
        own = self._waited + sum(seconds_between(*each) for each in passes)
        ranks = distributed.world_size()
        mine = [own, distributed.memory_bytes(), self._waited, float(asked), *self._loader.counts(), *self._before]
        everyones = distributed.gather_floats(mine)  # [ranks, values]
        own, memory = everyones[:, 0], everyones[:, 1]
        waited, stopping, *counts = everyones[:, 2:].sum(axis=0).tolist()
        now, before = Counts(*counts[: len(counts) // 2]), Counts(*counts[len(counts) // 2 :])
        here = Counts(*(after - earlier for after, earlier in zip(now, before, strict=True)))
        seconds = time.monotonic() - self._began
        threads, asked_for = ranks * self._settings.data.threads, here.cache_hits + here.cache_misses
        images = len(taken) * self._settings.global_batch
        self.images, self.seconds = self.images + images, self.seconds + seconds
        applied = [step for step in taken if step.applied]
        times = [1e3 * seconds_between(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]
        behind = float(own.max() - np.median(own)) / seconds
        return taken, {
            "loss": sum(step.loss for step in applied) / len(applied) if applied else None,
            "grad_norm": applied[-1].grad_norm if applied else None,
            "images_per_second": images / seconds, "images_per_second_per_rank": images / seconds / ranks,
            "utilisation": images / seconds * self._sample_seconds,
            "mb_per_second": here.bytes / 1e6 / seconds,
            "data_wait": waited / ranks / seconds, "read_share": here.read_seconds / threads / seconds,
            "decode_share": here.decode_seconds / threads / seconds,
            **{f"step_ms_{name}": float(np.percentile(times, at)) for name, at in PERCENTILES.items() if times},
            **({"slowest_rank": int(own.argmax()), "slowest_rank_behind": behind} if ranks > 1 else {}),
            "memory_gb": float(memory.max()) / 1e9,
            **({"cache_hit_share": here.cache_hits / asked_for} if asked_for else {}),
            "retries": int(now.retries), "replaced": int(now.replaced), "quarantined": int(now.quarantined),
        }, stopping > 0  # fmt: skip

    def _on_host(self) -> list[Taken]:
        if not self._steps:
            return []
        steps = [step for _, step in self._steps]
        numbers = [
            torch.stack(
                [torch.as_tensor(getattr(step, name)).to(steps[0].loss.device, torch.float64) for step in steps]
            )
            for name in ("loss", "grad_norm", "applied")
        ]
        return [
            Taken(samples, loss, norm, bool(applied))
            for (samples, _), (loss, norm, applied) in zip(self._steps, torch.stack(numbers, 1).tolist(), strict=True)
        ]
