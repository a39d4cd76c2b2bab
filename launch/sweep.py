"""Sweeps: a stage of a plan run once for each combination of some settings, and the best of them handed on.

A stage with a ``sweep`` is as many stages, ``NAME-0``, ``NAME-1`` and so on. Where another stage names it, by ``init``,
``{NAME}`` or ``best``, the one is meant whose held-out images came out best; before all have ended, the first.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.recipe import combinations, read_sweep
from pipeline.settings import flat, merge, nested
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
        table: dict[str, Any] = {}
        for key, value in self.changes[number].items():
            table = merge(table, nested(key, value))
        return table

    def best(self, results: list[dict[str, Any] | None]) -> int | None:
        """Return which of its results is best on held-out images; None: they are not all there.

        Raises:
            UserError: There were no held-out images.
        """
        there = [result for result in results if result is not None]
        if len(there) < len(results):
            return None
        scores = [score for result in there if (score := _score(result["result"].get("val"))) is not None]
        if len(scores) < len(there):
            raise UserError(f"the stages of sweep {self.name} tell nothing of held-out images; set data.val")
        return max(range(len(scores)), key=lambda number: scores[number])

    def summary(self, results: list[dict[str, Any]]) -> str:
        """Return what came out, in a line: the best, or of seeds the mean and its standard deviation."""
        found = [result["result"].get("val") or {} for result in results]
        metric = next((key for key in ("top1", "loss") if all(key in each for each in found)), None)
        if metric is None:
            return f"{len(results)} runs"
        values = [each[metric] for each in found]
        words, scale, unit = ("top-1", 100, " %") if metric == "top1" else ("loss", 1, "")
        if len(values) > 1 and all(changed.keys() == {"seed"} for changed in self.changes):
            mean = sum(values) / len(values)
            deviation = (sum((each - mean) ** 2 for each in values) / (len(values) - 1)) ** 0.5
            return f"{words} {scale * mean:.2f} ± {scale * deviation:.2f}{unit} over {len(values)} seeds"
        number = self.best([*results])
        assert number is not None  # all results are there
        best = ", ".join(f"{key}={value}" for key, value in flat(self.changes[number]).items())
        return f"best {best}: {words} {scale * values[number]:.2f}{unit}"


EACH = re.compile(r"\{([A-Za-z0-9_-]+)-\*\}")
"""In a list of values: what each run of another sweep makes."""


def sweep_of(
    name: str,
    told: str | dict[str, Any] | list[dict[str, Any]],
    recipe: str | Path | None,
    before: dict[str, Sweep] | None = None,
) -> Sweep:
    """Return the sweep of a stage.

    Args:
        name: Of the stage.
        told: ``"recipe"``: that of its recipe; or a table of lists by dotted key, whose n-th values go together, or
            several tables, of which every combination is meant.
        recipe: Of the stage.
        before: The sweeps that there are already, by name: for ``"{NAME-*}"``.

    Raises:
        UserError: There is none, or its lists are not of one length.
    """
    try:
        if told == "recipe" and recipe:
            changes = read_sweep(recipe)
        elif isinstance(told, str):
            raise ValueError
        else:
            tables = [flat(table) for table in (told if isinstance(told, list) else [told])]
            changes = combinations(
                [{key: _spread(values, name, before or {}) for key, values in table.items()} for table in tables]
            )
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"sweep of stage {name} is {told!r}; give lists of one length by setting, as in "
            '{ "optim.lr" = [0.01, 0.03] }, or "recipe"'
        ) from None
    if changes == [{}]:
        raise UserError(f"stage {name} has a sweep without values{' in its recipe' if told == 'recipe' else ''}")
    return Sweep(name, changes)


def _spread(values: Any, name: str, before: dict[str, Sweep]) -> list[Any]:
    """Return the values of a setting, ``"{NAME-*}"`` being as many as sweep NAME has runs."""
    if not isinstance(values, list):
        raise ValueError  # of a word, the letters would be
    spread = []
    for value in values:
        found = EACH.fullmatch(value) if isinstance(value, str) else None
        if found and found[1] not in before:
            raise UserError(f"sweep of stage {name} names {value}, and no stage above it with a sweep is {found[1]}")
        spread += [f"{{{member}}}" for member in before[found[1]].members] if found else [value]
    return spread


def _score(val: dict[str, float] | None) -> float | None:
    """Return how good an evaluation is; what is no number is worse than all."""
    if val is None:
        return None
    score = val["top1"] if "top1" in val else -val["loss"]
    return -math.inf if math.isnan(score) else score
