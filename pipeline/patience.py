"""The best evaluation so far, and when a stage has gone on long enough without a better one."""

from collections.abc import Callable
from typing import Any

from pipeline.config import TrainSettings


def note_best(state: dict[str, Any], samples: int, better: Callable[[dict, dict], bool]) -> bool:
    """Return whether the evaluation ``state["val"]`` is the best so far, and keep count of those that were not."""
    if state["best"] is not None and not better(state["val"], state["best"]):
        state["worse"] += 1
        return False
    state["best"], state["worse"] = {"samples": samples, **state["val"]}, 0
    return True


def lost(settings: TrainSettings, state: dict[str, Any]) -> bool:
    """Tell whether patience ends the stage: so many evaluations in a row were not the best."""
    return settings.evaluate.patience is not None and state["worse"] >= settings.evaluate.patience
