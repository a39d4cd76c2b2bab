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
        milestones: After which a learning rate that goes down in steps goes down.
        periods: Of ``log``, ``save``, ``evaluate`` and, where there is one, ``probe`` and ``keep``.
    """

    settings: TrainSettings
    total: int
    warmup: int
    milestones: tuple[int, ...]
    periods: dict[str, int]

    @classmethod
    def of(cls, settings: TrainSettings, epoch: int | None, first_batch: int) -> "Schedule":
        """Return the schedule of a stage.

        Args:
            settings: Of the stage.
            epoch: Samples of an epoch; None where nobody knows how many.
            first_batch: The global batch that the run began with. A step of ``duration``, ``warmup`` and ``milestones``
                stays that many samples, so that another batch on resume leaves the learning rate where it was.
        """
        batch, schedule = settings.global_batch, settings.schedule
        periods = {"log": settings.log_every, "save": settings.checkpoint.every, "evaluate": settings.evaluate.every}
        periods |= {"probe": settings.probe.every} if settings.probe else {}
        periods |= {"keep": settings.checkpoint.keep_every} if settings.checkpoint.keep_every else {}
        return cls(
            settings,
            total=max(1, round(settings.duration.samples(epoch, first_batch) / first_batch)) * first_batch,
            warmup=schedule.warmup.samples(epoch, first_batch),
            milestones=tuple(milestone.samples(epoch, first_batch) for milestone in schedule.milestones),
            periods={what: max(1, period.samples(epoch, batch)) for what, period in periods.items()},
        )

    def due(self, what: str, seen: int) -> bool:
        """Tell whether the step that ended at ``seen`` samples crossed a point of this kind, or ended the run."""
        if what not in self.periods:
            return False
        before = seen - self.settings.global_batch
        return seen >= self.total or seen // self.periods[what] > before // self.periods[what]

    def rate(self, seen: int) -> float:
        """Return the learning rate of the step that ends at ``seen`` samples, which for the first step is not zero.

        ``linear`` and ``cosine`` are the formulas of the official code, ``steps`` is the staircase of BiT.
        """
        schedule, base = self.settings.schedule, self.settings.optim.lr
        done = min(1.0, max(0.0, (seen - self.warmup) / max(1, self.total - self.warmup)))
        if schedule.shape == "linear":
            rate = schedule.end_lr + (base - schedule.end_lr) * (1.0 - done)
        elif schedule.shape == "cosine":
            rate = schedule.end_lr + (base - schedule.end_lr) * 0.5 * (1.0 + math.cos(math.pi * done))
        else:
            rate = base * schedule.factor ** sum(seen > milestone for milestone in self.milestones)
        return rate * min(1.0, seen / self.warmup) if self.warmup else rate
