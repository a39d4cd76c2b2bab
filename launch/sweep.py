"""Sweeps: a stage of a plan run once for each combination of some settings, and the best of them handed on.

A stage with a ``sweep`` is as many stages, ``NAME-0``, ``NAME-1`` and so on. Where another stage names it, by ``init``,
``{NAME}`` or ``best``, the one is meant whose held-out images came out best; before all have ended, the first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe import combinations, read_sweep
from pipeline.settings import override
from shards.errors import UserError


@dataclass(frozen=True)
class Sweep:
    """A stage that is run several times.

    Attributes:
        name: Of the stage.
        changes: The settings that each run has of its own, by dotted key.
    """

    name: str
    changes: list[dict[str, Any]]

    @property
    def members(self) -> list[str]:
        """The names of the stages that it is."""
        return [f"{self.name}-{number}" for number in range(len(self.changes))]

    def settings(self, number: int) -> dict[str, Any]:
        """Return what one of them sets, as a table."""
        changed = self.changes[number]
        return override({}, [f"{key}={json.dumps(value)}" for key, value in changed.items()])

    def best(self, results: list[dict[str, Any] | None]) -> int | None:
        """Return which of its results is best on held-out images; None: they are not all there.

        Raises:
            UserError: There were no held-out images.
        """
        if any(result is None for result in results):
            return None
        scores = [_score(result["result"].get("val")) for result in results]
        if None in scores:
            raise UserError(f"the stages of sweep {self.name} tell nothing of held-out images; set data.val")
        return max(range(len(scores)), key=scores.__getitem__)

    def summary(self, results: list[dict[str, Any]]) -> str:
        """Return what came out, in a line: the best, or of seeds the mean and its standard deviation."""
        top1 = [(result["result"].get("val") or {}).get("top1") for result in results]
        if None in top1:
            return f"{len(results)} runs"
        if all(changed.keys() == {"seed"} for changed in self.changes) and len(top1) > 1:
            mean = sum(top1) / len(top1)
            deviation = (sum((each - mean) ** 2 for each in top1) / (len(top1) - 1)) ** 0.5
            return f"top-1 {100 * mean:.2f} ± {100 * deviation:.2f} % over {len(top1)} seeds"
        number = self.best(results)
        best = ", ".join(f"{key}={value}" for key, value in self.changes[number].items())
        return f"best {best}: top-1 {100 * top1[number]:.2f} %"


def sweep_of(name: str, told: str | dict[str, Any] | list[dict[str, Any]], recipe: str | Path | None) -> Sweep:
    """Return the sweep of a stage.

    Args:
        name: Of the stage.
        told: ``"recipe"``: that of its recipe; or a table of lists by dotted key, whose n-th values go together, or
            several tables, of which every combination is meant.
        recipe: Of the stage.

    Raises:
        UserError: There is none, or its lists are not of one length.
    """
    try:
        changes = read_sweep(recipe) if told == "recipe" and recipe else combinations(told)
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"sweep of stage {name} is {told!r}; give lists of one length by setting, as in "
            '{ "optim.lr" = [0.01, 0.03] }, or "recipe"'
        ) from None
    if changes == [{}]:
        raise UserError(f"stage {name} has a sweep without values{' in its recipe' if told == 'recipe' else ''}")
    return Sweep(name, changes)


def _score(val: dict[str, float] | None) -> float | None:
    return None if val is None else val["top1"] if "top1" in val else -val["loss"]
