"""Smoke runs: a training stage shrunk to seconds, in this process."""

import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import distributed
from pipeline.config import TrainSettings, check
from pipeline.recipe import About, Recipe
from pipeline.smoke import fill_in, shrink
from pipeline.train import train
from pipeline.weights import Weights
from shards.errors import UserError


def smoke_run(table: dict[str, Any], about: About | None, where: str, out: Path | None = None) -> dict[str, Any]:
    """Run the smoke form of a training stage; collective over all ranks.

    Args:
        table: Settings of the stage; data and weights that it does not name are made on the spot.
        about: Of its recipe, if it has one.
        where: The settings stand, for errors.
        out: Folder to keep what it makes; by default nothing is kept.

    Returns:
        What ``train`` returns, and ``seconds`` that everything took.
    """
    began = time.monotonic()
    rank, ranks = distributed.rank(), distributed.world_size()
    with ExitStack() as stack:
        if out is None:
            mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="patchmill-smoke-")) if rank == 0 else ""
            out = Path(distributed.everyone(mine)[0])
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(distributed.alone_in(out))
        problem = None
        try:
            table, weights = fill_in(table, about, out, make=rank == 0)
        except UserError as error:
            problem = error
        distributed.raise_together(problem)  # rank 0 has made everything when the others go on
        settings = check(TrainSettings, table, where)
        if weights is None and settings.init is not None:
            weights = Weights(settings.init).model
        result = train(shrink(settings, ranks, weights), out)
    return {**result, "seconds": round(time.monotonic() - began, 1)}


def smoke_alone(recipes: list[Recipe], as_json: bool) -> None:
    """Run the smoke form of recipes, one after the other, and say of each what came out and how long it took."""
    distributed.start()
    table = Table("recipe", "loss", "images/s", "seconds", box=None)
    ran = []
    try:
        for recipe in recipes:
            result = smoke_run(recipe.settings, recipe.about, recipe.name)
            ran.append({"name": recipe.name, **{key: result[key] for key in ("val", "images_per_second", "seconds")}})
    finally:
        distributed.finish()
    if as_json:
        print(json.dumps(ran))
        return
    for each in ran:
        table.add_row(each["name"], f"{each['val']['loss']:.3f}", f"{each['images_per_second']:.0f}", str(each["seconds"]))
    Console().print(table)
