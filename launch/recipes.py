"""What ``patchmill recipes`` prints: all recipes as a table, or one whole."""

import json
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import TrainSettings
from pipeline.recipe import Recipe, recipe_names

FEW = 12  # commands of a sweep that are printed one by one
PAPER = "ViT paper"

COLUMNS: dict[str, Callable[[Recipe, TrainSettings], str]] = {
    "name": lambda recipe, settings: recipe.name,
    "model": lambda recipe, settings: settings.model.name or "any",
    "data": lambda recipe, settings: recipe.about.data,
    "length": lambda recipe, settings: _length(recipe),
    "batch": lambda recipe, settings: str(settings.global_batch),
    "LR": lambda recipe, settings: _range(recipe.swept.get("optim.lr", [settings.optim.lr])),
    "decay": lambda recipe, settings: _range(recipe.swept.get("optim.weight_decay", [settings.optim.weight_decay])),
    "schedule": lambda recipe, settings: settings.schedule.shape,
    "expected": lambda recipe, settings: _expected(recipe),
    "exaFLOPs": lambda recipe, settings: f"{recipe.about.exaflops:g}",
    "source": lambda recipe, settings: recipe.about.source,
}
SPARE = ("model", "data", "source", "schedule", "decay", "batch", "LR")
"""Columns that a narrow terminal does without, the first first: a name says model and data."""
FOLDED = 12
"""Width of the lengths where there is still no room: the unit of the longest goes to a second line."""


def print_table(recipes: list[Recipe], width: int | None) -> None:
    """Print a line a recipe, as many columns of it as ``width`` has room for; all of them where it is None."""
    rows = [{title: cell(recipe, recipe.checked) for title, cell in COLUMNS.items()} for recipe in recipes]
    groups = groupby(zip(recipes, rows, strict=True), key=lambda pair: _first_source(pair[0]))
    titles = list(COLUMNS)
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) for title in titles}
    for title in SPARE:
        if width and sum(widths[each] + 2 for each in titles) > width:
            titles.remove(title)
    fold = width is not None and sum(widths[each] + 2 for each in titles) > width
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        right = title in ("batch", "LR", "decay", "exaFLOPs")
        whole, most = title in ("name", "LR", "exaFLOPs"), FOLDED if fold and title == "length" else None
        table.add_column(title, justify="right" if right else "left", no_wrap=whole, max_width=most)
    for _, group in groups:
        for _, row in group:
            table.add_row(*(row[title] for title in titles))
        table.add_row()
    console = Console(width=width or sum(widths.values()) + 2 * len(titles), highlight=False)
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))  # a file wants no blanks at the end of lines
    console.print("expected: top-1, per cent. `patchmill recipes NAME` shows one whole: its command, where it is from.")
    if missing := [title for title in COLUMNS if title not in titles]:
        console.print(f"not shown for want of room: {', '.join(missing)}; a wider terminal or --json has them")


def in_order(recipes: list[Recipe]) -> list[Recipe]:
    """Return recipes as the table has them: the paper's first, table by table."""
    return sorted(recipes, key=lambda r: (not r.about.source.startswith(PAPER), _first_source(r), r.name))


def print_recipe(recipe: Recipe) -> None:
    """Print a recipe's file, and its command, or the commands of its sweep, as comments: together they are TOML."""
    print(recipe.text)
    commands = recipe.commands
    if len(commands) <= FEW:
        print("\n".join(f"# {command}" for command in commands))
        return
    values = recipe.swept
    print(f"# {recipe.about.command} ...")
    for key, each in values.items():
        print(f"#     {key}: {', '.join(map(str, each))}")
    print(f"# {len(commands)} runs in all; --json has the command of each.")


def run_smoke_forms(recipes: list[Recipe], as_json: bool) -> None:
    """Run the smoke form of recipes, one after the other in this process, and print what came out."""
    from pipeline import distributed
    from pipeline.smoke import smoke_run

    distributed.start()
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
    table = Table("recipe", "loss", "images/s", "seconds", box=None)
    for each in ran:
        loss, speed = f"{each['val']['loss']:.3f}", f"{each['images_per_second']:.0f}"
        table.add_row(each["name"], loss, speed, str(each["seconds"]))
    Console().print(table)


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """Return all that is known of a recipe."""
    settings = recipe.checked
    return {
        "name": recipe.name, **recipe.about.model_dump(mode="json"), "kind": settings.kind,
        "duration": settings.duration, "global_batch": settings.global_batch, "lr": settings.optim.lr,
        "weight_decay": settings.optim.weight_decay, "schedule": settings.schedule.shape,
        "resolution": settings.data.resolution, "sweep": recipe.swept, "commands": recipe.commands,
        "settings": recipe.settings,
    }  # fmt: skip


def _first_source(recipe: Recipe) -> str:
    """Return where a recipe is from, the first table of several: those of Table 3 stand together."""
    return re.sub(r"Tables (\d+) and .*", r"Table \1", recipe.about.source)


def _expected(recipe: Recipe) -> str:
    """Return what is expected of the model whose FLOPs stand in the same row, or the range over all weights."""
    if not recipe.about.expected:
        return "not printed"
    values, model = recipe.about.expected[0].values, recipe.about.model
    own = [name for name in values if name == model or name.startswith(f"{model}_")]
    if not own and set(values) <= set(recipe_names()):
        return f"{_range(values.values())} by weights"
    name = own[0] if own else next(iter(values))
    return f"{values[name]:g} {name}"


def _length(recipe: Recipe) -> str:
    lengths = [length.split() for length in recipe.swept.get("duration", [recipe.settings["duration"]])]
    return f"{_range(float(number) for number, _ in lengths)} {lengths[0][1]}"


def _range(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    return f"{low:,.10g}" if low == high else f"{low:,.10g}-{high:,.10g}"
