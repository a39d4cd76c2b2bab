"""What a run measures between two log lines: speed, loss and what the loader did, over all ranks."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

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
    """The steps since the last log line. A pause in it, for a save between two lines, is left out of its speed.

    Args:
        settings: Of the stage.
        loader: Whose counts are read.
        sample_seconds: What training on a sample takes at the least, were all of it matrix products on all ranks.

    Attributes:
        images: Trained on in all windows that were settled, over all ranks.
        seconds: That those windows took.
    """

    def __init__(self, settings: TrainSettings, loader: Loader | ProcessLoader | StreamLoader, sample_seconds: float):
        self.images, self.seconds = 0, 0.0
        self._settings, self._loader, self._sample_seconds = settings, loader, sample_seconds
        self.clear()
        self.open()

    @property
    def speed(self) -> float | None:
        """Images a second in all windows that were settled, over all ranks; None: there was none."""
        return self.images / self.seconds if self.images else None

    def clear(self) -> None:
        """Forget the steps: they have their line."""
        self._losses, self._applied = 0.0, 0
        self._grad_norm: float | None = None

    def state_dict(self) -> dict[str, float | int | None]:
        """Return what a line needs of the settled steps; a run that goes on from a save logs the same lines."""
        return {"losses": self._losses, "applied": self._applied, "grad_norm": self._grad_norm}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; one from before there were saves between two lines has none."""
        if state is not None:
            self._losses, self._applied, self._grad_norm = state["losses"], state["applied"], state["grad_norm"]

    def open(self) -> None:
        """Begin to measure; steps from here on are on their device."""
        self._steps: list[tuple[int, Step]] = []
        self._waited = 0.0
        self._passes: list[tuple[Mark, Mark]] = []
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

    def settle(self) -> list[Taken]:
        """Return the steps since ``open``, on the host; waits for the device."""
        taken = self._on_host()
        self._lasted = time.monotonic() - self._began
        self.images, self.seconds = self.images + len(taken) * self._settings.global_batch, self.seconds + self._lasted
        for step in taken:
            if step.applied:
                self._losses, self._applied = self._losses + step.loss, self._applied + 1
                self._grad_norm = step.grad_norm
        return taken

    def measure(self) -> dict[str, float | int | None]:
        """Return the values of a log line, of settled steps; collective over all ranks.

        Shares are of the time of all ranks, those of reading and decoding of the time of all their decode threads; the
        last counts are since the run started. Loss and gradient norm are of the steps that were not held back, None if
        all were.
        """
        # Under ZeRO 3 a forward pass waits for others, for the weights that they hold.
        passes = [] if self._settings.engine.zero_stage == 3 else self._passes
        busy = self._waited + sum(seconds_between(*each) for each in passes)
        ranks, seconds = distributed.world_size(), self._lasted
        mine = [busy, distributed.memory_bytes(), self._waited, *self._loader.counts(), *self._before]
        everyones = distributed.gather_floats(mine)  # [ranks, values]
        own, memory = everyones[:, 0], everyones[:, 1]
        waited, *counts = everyones[:, 2:].sum(axis=0).tolist()
        now, before = Counts._make(counts[: len(counts) // 2]), Counts._make(counts[len(counts) // 2 :])
        here = Counts._make(after - earlier for after, earlier in zip(now, before, strict=True))
        threads, asked_for = ranks * self._settings.data.threads, here.cache_hits + here.cache_misses
        images = len(self._steps) * self._settings.global_batch
        times = [1e3 * seconds_between(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]
        behind = float(own.max() - np.median(own)) / seconds
        return {
            "loss": self._losses / self._applied if self._applied else None,
            "grad_norm": self._grad_norm,
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
        }  # fmt: skip

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
