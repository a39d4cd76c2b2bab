"""What is measured between two steps on other data than the training set: the held-out set, and probes."""

from contextlib import nullcontext
from typing import Any

from pipeline.config import TrainSettings
from pipeline.evaluate.probe import Probe
from pipeline.patience import note_best
from pipeline.schedule import Schedule
from pipeline.telemetry import Telemetry
from shards.dataset import Dataset


class Validation:
    """Evaluations of a stage.

    Args:
        settings: Of the stage.
        held_out: What is evaluated on, if anything.
        schedule: Of the stage.
        state: Of the run: ``val`` (the last evaluation), ``best``, ``worse`` (how many since) and ``probe`` are kept.
    """

    def __init__(self, settings: TrainSettings, held_out: Dataset | None, schedule: Schedule, state: dict[str, Any]):
        self._settings, self._held_out, self._schedule, self._state = settings, held_out, schedule, state
        self._probe = Probe(settings) if settings.probe else None

    def due(self, samples: int) -> bool:
        """Tell whether there is anything to measure at so many samples consumed."""
        return self._evaluating(samples) or self._probing(samples)

    def measure(self, engine: Any, objective: Any, samples: int, telemetry: Telemetry | None) -> bool:
        """Measure what is due, and return whether the held-out set was never as good; collective over all ranks."""
        engine.model.eval()
        best = False
        with engine.averaged() if self._settings.evaluate.ema else nullcontext():
            if self._evaluating(samples):
                self._state["val"] = objective.evaluate(engine.model, self._held_out)
                if telemetry:
                    telemetry.log(samples, {f"val_{key}": value for key, value in self._state["val"].items()})
                best = note_best(self._state, samples, objective.better)
            if self._probe is not None and self._probing(samples):
                self._state["probe"] = self._probe.measure(engine.model, samples, telemetry)
        return best

    def shown(self) -> dict[str, float | None]:
        """Return the last findings that a progress line shows."""
        val = self._state["val"]
        return {"val_top1": val and val.get("top1"), **self._state["probe"]}

    def _evaluating(self, samples: int) -> bool:
        return self._held_out is not None and self._schedule.due("evaluate", samples)

    def _probing(self, samples: int) -> bool:
        return self._probe is not None and self._schedule.due("probe", samples)
