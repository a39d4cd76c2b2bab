"""Recipes that ship with Patchmill: the settings of a published training run, and an ``[about]`` table of what it was.

A recipe is a file of settings as anybody writes one, without the places of data and weights. Two of its tables are not
settings: ``[about]``, and ``[sweep]``, the values that were tried. In a table of a sweep the settings change together,
the n-th value of one with the n-th of the others; of several ``[[sweep]]`` tables every combination is meant.
"""

import json
import os
import shlex
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from pipeline.config import TrainSettings
from pipeline.settings import Settings, check, flat, merge, nearest, read_toml
from shards.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
PLACES = {"data": {"train": "TRAIN", "val": "VAL"}, "init": "WEIGHTS.safetensors"}
"""What a recipe leaves to its user, in the words of its command."""


class Expected(Settings):
    """Published numbers that a recipe is to reach."""

    metric: str
    source: str
    values: dict[str, float] = Field(min_length=1, description="per cent, by data set or by recipe of the weights")


class About(Settings):
    """Where a recipe comes from, and what came out of it there."""

    title: str
    source: str = Field(description="paper and table, or where else its numbers stand")
    command: str
    model: str = Field(description="whose FLOPs are counted; the model itself where the stage takes it from weights")
    data: str
    classes: int | None = Field(None, gt=0, description="of the data, where that is one data set")
    images: int | None = Field(None, gt=0, description="of an epoch, where lengths are in epochs")
    hardware: str
    exaflops: float = Field(gt=0, description="forward and backward of the whole run, a multiply-add as 2")
    exaflops_from: str
    expected: tuple[Expected, ...] = ()
    gaps: tuple[str, ...] = Field((), description="what the source does not say, and what was chosen")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        name: Of its file.
        text: The file as it is.
        settings: As a stage's ``set`` has them.
        about: Where it comes from.
        sweep: The settings that each run of a sweep changes, by dotted key; one empty table where there is no sweep.
    """

    name: str
    text: str
    settings: dict[str, Any]
    about: About
    sweep: list[dict[str, Any]]

    @property
    def checked(self) -> TrainSettings:
        """The settings, with words for what is left to the user."""
        places = PLACES if self.settings.get("kind") == "finetune" else {"data": PLACES["data"]}
        return check(TrainSettings, merge(places, self.settings), self.name)

    @property
    def commands(self) -> list[str]:
        """The command line of every run of the sweep."""
        return [" ".join([self.about.command, *_assignments(changed)]) for changed in self.sweep]

    @property
    def swept(self) -> dict[str, list[Any]]:
        """The values that a setting takes in the sweep, each once, by dotted key."""
        return {key: list(dict.fromkeys(changed[key] for changed in self.sweep)) for key in self.sweep[0]}


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """Return a recipe by name."""
    if name not in (names := recipe_names()):
        raise UserError(f"there is no recipe {name!r}{nearest(name, names, most=3)}; `patchmill recipes` lists them")
    path = RECIPES / f"{name}.toml"
    table = read_toml(path)
    about, sweep = check(About, table.pop("about"), f"[about] of {name}"), combinations(table.pop("sweep", {}))
    return Recipe(name, path.read_text(encoding="utf-8"), table, about, sweep)


def read_settings(config: str | Path) -> tuple[dict[str, Any], About | None]:
    """Return the settings of a file, or of a recipe by name, and what the file says about them."""
    if Path(config).suffix == ".toml" or os.path.isfile(config):  # a folder of a recipe's name is a run of it
        table = read_toml(config)
        table.pop("sweep", None)  # of a copy of a recipe
        about = table.pop("about", None)
        return table, about and check(About, about, f"[about] of {config}")
    recipe = read_recipe(str(config))
    return recipe.settings, recipe.about


def read_sweep(config: str | Path) -> list[dict[str, Any]]:
    """Return the settings that each run of a sweep changes, of a file, or of a recipe by name."""
    if Path(config).suffix == ".toml":
        return combinations(read_toml(config).get("sweep", {}))
    return read_recipe(str(config)).sweep


def combinations(sweep: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every combination of a sweep's tables, as settings by dotted key."""
    axes = [list(_together(flat(table))) for table in (sweep if isinstance(sweep, list) else [sweep])]
    return [{key: value for each in combination for key, value in each.items()} for combination in product(*axes)]


def _together(values: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Return the settings of one table of a sweep, the n-th values of all in the n-th."""
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)] or [{}]


def _assignments(changed: dict[str, Any]) -> list[str]:
    """Return ``key=value`` as a shell hands it to ``override``."""
    return [
        shlex.quote(f"{key}={value if isinstance(value, str) else json.dumps(value)}") for key, value in changed.items()
    ]
