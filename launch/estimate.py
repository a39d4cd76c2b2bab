"""``patchmill estimate``: what to estimate, and the table of what was found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.plan import read_plan
from pipeline.config import ModelSettings, TrainSettings, check, merge, override
from pipeline.estimate import estimate_model, estimate_stage
from pipeline.recipe import PLACES, About, read_settings
from pipeline.weights import check_model
from shards.errors import UserError

NUMBERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters": lambda each: f"{each['parameters']:,}",
    "GMAC": lambda each: f"{each['forward_macs'] / 1e9:,.3f}",
    "GFLOPs": lambda each: f"{each['forward_flops'] / 1e9:,.2f}",
    "samples": lambda each: f"{each['samples']:,}" if "samples" in each else "",
    "exaFLOPs": lambda each: f"{each['exaflops']:,.4g}" if "samples" in each else "",
}
GAP = 2  # between two columns
LEAST = 8  # that a column of names is narrowed to


class ModelAlone(ModelSettings):
    """Settings of a model that no stage gives its resolution, classes and target."""

    image_size: int | None = None
    num_classes: int | None = None
    patch_target: str | None = None
    decoder_depth: int | None = None
    decoder_dim: int | None = None
    decoder_heads: int | None = None


def estimates(
    arguments: list[str], model: str | None, samples: int | None, classes: int | None, epoch: int | None
) -> list[dict[str, Any]]:
    """Return an estimate of each training stage of a plan, of one stage, or of a model.

    Args:
        arguments: A plan; or settings of a stage, or a recipe's name, and ``key=value`` overrides of those; with
            ``model`` its settings.
        model: Name of a model, in place of a file.
        samples: Length of a training of ``model``.
        classes: What to take where neither the data set nor a recipe is to be asked.
        epoch: Likewise, its samples.

    Returns:
        What ``pipeline.estimate`` tells of each, after its ``name``.
    """
    if model is not None:
        over = override({"num_classes": classes} if classes else {}, arguments)
        if "name" in over:
            raise UserError(f"name={over['name']} is one model and --model {model} another; give one of them")
        checked = check(ModelAlone, over, f"--model {model}")
        return [{"name": model, **estimate_model({"name": model} | checked.overrides(), samples)}]
    if not arguments:
        raise UserError("nothing to estimate; give the settings of a stage, a plan, or --model NAME")
    if samples is not None:
        raise UserError("--samples is of --model; the length of a stage is its duration, so override that")
    path, *over = arguments
    table, about = read_settings(path)
    if "stage" not in table:
        table = override(table, over)
        if about is not None:
            table, classes, epoch = _filled_in(table, about, path, classes, epoch)
        settings = check(TrainSettings, table, path)
        check_model(settings, path)
        return [{"name": Path(path).stem, **estimate_stage(settings, classes, epoch)}]
    if over:
        raise UserError(f"{over[0]!r} overrides settings of a stage, and {path} is a plan; change its set tables")
    return [
        {"name": stage.table.name, **estimate_stage(stage.settings, classes, epoch)}
        for stage in read_plan(path).stages
        if isinstance(stage.settings, TrainSettings)
    ]


def _filled_in(
    table: dict[str, Any], about: About, path: str, classes: int | None, epoch: int | None
) -> tuple[dict[str, Any], int | None, int | None]:
    """Take from what a recipe says the model and the data that its settings leave to the user."""
    if "init" not in table and "name" not in table.get("model", {}):
        table = merge(table, {"model": {"name": about.model}})
    if "train" not in table.get("data", {}):
        table = merge(table, {"data": PLACES["data"]})
        classes, epoch = classes or about.classes, epoch or about.images
        if classes is None:
            raise UserError(f"{path} is for {about.data}, and does not say how many classes; give --classes")
    return table, classes, epoch


def print_estimates(found: list[dict[str, Any]], width: int | None) -> None:
    """Print a table with a row for each estimate; names fold where it is wider than ``width``, and no number does."""
    names = ["name", "model"] if any(each["name"] != each["model"] for each in found) else ["model"]
    shown = [title for title in NUMBERS if any(NUMBERS[title](each) for each in found)]
    rows = [
        {**{name: each[name] for name in names}, **{title: NUMBERS[title](each) for title in shown}} for each in found
    ]
    widths = {title: max(len(title), *(len(row[title]) for row in rows)) + GAP for title in rows[0]}
    full, least = sum(widths.values()), sum(widths[title] for title in shown) + (LEAST + GAP) * len(names)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for title in names:
        table.add_column(title, overflow="fold")
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True, min_width=widths[title] - GAP)
    for row in rows:
        table.add_row(*row.values())
    Console(width=full if width is None else max(least, min(full, width)), highlight=False).print(table)
    print("GMAC, GFLOPs: of one image, forward; exaFLOPs: of the whole training, forward and backward.")
