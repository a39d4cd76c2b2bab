"""When things happen in a run, and learning rates, as functions of samples seen."""

import math
from dataclasses import dataclass

from pipeline.config import TrainSettings


@dataclass(frozen=True)
class Schedule:
    """A training stage's lengths and periods, all in samples.

    Attributes:
        settings: Of the stage.
        total: Where it ends: a whole number of steps.
        warmup: Where the learning rate's warm-up ends.
        periods: Of ``log``, ``save`` and ``evaluate``.
    """

    settings: TrainSettings
    total: int
    warmup: int
    periods: dict[str, int]

    @classmethod
    def of(cls, settings: TrainSettings, epoch: int | None) -> "Schedule":
        """Return the schedule of a stage whose epoch has ``epoch`` samples; None where nobody knows how many."""
        batch = settings.global_batch
        periods = {"log": settings.log_every, "save": settings.checkpoint.every, "evaluate": settings.evaluate.every}
        return cls(
            settings,
            total=max(1, round(settings.duration.samples(epoch, batch) / batch)) * batch,
            warmup=settings.schedule.warmup.samples(epoch, batch),
            periods={what: max(1, period.samples(epoch, batch)) for what, period in periods.items()},
        )

    def due(self, what: str, seen: int) -> bool:
        """Tell whether the step that ended at ``seen`` samples crossed a point of this kind, or ended the run."""
        before = seen - self.settings.global_batch
        return seen >= self.total or seen // self.periods[what] > before // self.periods[what]

    def rate(self, seen: int) -> float:
        """Return the learning rate of the step that ends at ``seen`` samples."""
        return learning_rate(
            seen,
            shape=self.settings.schedule.shape,
            base=self.settings.optim.lr,
            end=self.settings.schedule.end_lr,
            warmup=self.warmup,
            total=self.total,
        )


def learning_rate(seen: int, *, shape: str, base: float, end: float, warmup: int, total: int) -> float:
    """Return the learning rate of the step that ends at ``seen`` samples (vit-paper 2.2, the official formula).

    Args:
        seen: Samples consumed when the step is over, so the first step's rate is not zero.
        shape: ``"linear"`` or ``"cosine"`` decay.
        base: Peak learning rate.
        end: Rate at ``total``.
        warmup: Samples of linear warm-up from zero.
        total: Samples of the whole run.
    """
    done = min(1.0, max(0.0, (seen - warmup) / max(1, total - warmup)))
    if shape == "linear":
        rate = end + (base - end) * (1.0 - done)
    else:
        rate = end + (base - end) * 0.5 * (1.0 + math.cos(math.pi * done))
    return rate * min(1.0, seen / warmup) if warmup else rate
