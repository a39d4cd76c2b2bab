"""``patchmill estimate``: what to estimate, and the table of what was found."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.plan import read_plan
from pipeline.config import TrainSettings, check, override
from pipeline.estimate import estimate_model, estimate_stage
from pipeline.recipe import read_settings
from shards.errors import UserError


def estimates(
    arguments: list[str], model: str | None, samples: int | None, classes: int | None, epoch: int | None
) -> list[dict[str, Any]]:
    """Return an estimate of each training stage of a plan, of one stage, or of a model.

    Args:
        arguments: A plan; or settings of a stage, or a recipe's name, and ``key=value`` overrides of those; with
            ``model`` its settings.
        model: Name of a model, in place of a file.
        samples: Length of a training of ``model``.
        classes: What to take where the data set is not to be asked.
        epoch: Likewise, its samples.

    Returns:
        What ``pipeline.estimate`` tells of each, after its ``name``.
    """
    if model is not None:
        named = {"num_classes": classes} if classes else {}
        settings = {"name": model, **named, **override({}, arguments)}
        return [{"name": model, **estimate_model(settings, samples)}]
    if not arguments:
        raise UserError("nothing to estimate; give the settings of a stage, a plan, or --model NAME")
    if samples is not None:
        raise UserError("--samples is of --model; the length of a stage is its duration, so override that")
    path, *over = arguments
    table, _ = read_settings(path)
    if "stage" not in table:
        settings = check(TrainSettings, override(table, over), path)
        return [{"name": Path(path).stem, **estimate_stage(settings, classes, epoch)}]
    if over:
        raise UserError(f"{over[0]!r} overrides settings of a stage, and {path} is a plan; change its set tables")
    return [
        {"name": stage.table.name, **estimate_stage(stage.settings, classes, epoch)}
        for stage in read_plan(path).stages
        if isinstance(stage.settings, TrainSettings)
    ]


def print_estimates(found: list[dict[str, Any]]) -> None:
    """Print a table with a row for each estimate."""
    table = Table()
    for head in ("", "model", "parameters", "forward GMAC", "GFLOPs an image", "samples", "exaFLOPs of the training"):
        table.add_column(head, justify="left" if head in ("", "model") else "right")
    for each in found:
        trained = [f"{each['samples']:,}", f"{each['exaflops']:,.4g}"] if "samples" in each else ["", ""]
        macs, flops = each["forward_macs"] / 1e9, each["forward_flops"] / 1e9
        table.add_row(each["name"], each["model"], f"{each['parameters']:,}", f"{macs:,.3f}", f"{flops:,.2f}", *trained)
    Console().print(table)
