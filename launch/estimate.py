"""``patchmill estimate``: what to estimate, and the table of what was found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch.plan import read_plan
from pipeline.config import ModelSettings, TrainSettings
from pipeline.estimate import ROOM, Hardware, estimate_model, estimate_stage
from pipeline.recipe import PLACES, About, read_settings
from pipeline.settings import check, merge, override
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
    arguments: list[str],
    model: str | None,
    samples: int | None,
    classes: int | None,
    epoch: int | None,
    image_bytes: int | None = None,
    gpus: int | None = None,
    gpu: str | None = None,
    utilisation: float = 0.4,
) -> list[dict[str, Any]]:
    """Return an estimate of each training stage of a plan, of one stage, or of a model.

    Args:
        arguments: A plan; or settings of a stage, or a recipe's name, and ``key=value`` overrides of those; with
            ``model`` its settings.
        model: Name of a model, in place of a file.
        samples: Length of a training of ``model``.
        classes: What to take where neither the data set nor a recipe is to be asked.
        epoch: Likewise, its samples.
        image_bytes: Likewise, the mean size of an image.
        gpus: Ranks; None: those that a plan gives its stages, and else one if ``gpu`` is given.
        gpu: Name of a card; with neither, memory and time are not told.
        utilisation: Share of the card's peak that is assumed.

    Returns:
        What ``pipeline.estimate`` tells of each, after its ``name``.
    """
    if model is not None:
        if gpus or gpu:
            raise UserError("--gpus and --gpu are of a training stage; give its settings or a recipe, not --model")
        given = override({"num_classes": classes} if classes else {}, arguments)
        if "name" in given:
            raise UserError(f"name={given['name']} is one model and --model {model} another; give one of them")
        checked = check(ModelAlone, given, f"--model {model}")
        return [{"name": model, **estimate_model({"name": model} | checked.overrides(), samples)}]
    if not arguments:
        raise UserError("nothing to estimate; give the settings of a stage, a plan, or --model NAME")
    if samples is not None:
        raise UserError("--samples is of --model; the length of a stage is its duration, so override that")
    path, *over = arguments

    def hardware(ranks: int) -> Hardware | None:
        return Hardware(gpus or ranks, gpu, utilisation) if gpus or gpu else None

    table, about = read_settings(path)
    if "stage" not in table:
        table = override(table, over)
        if about is not None:
            table, classes, epoch = _filled_in(table, about, path, classes, epoch)
        settings = check(TrainSettings, table, path)
        check_model(settings, path)
        return [{"name": Path(path).stem, **estimate_stage(settings, classes, epoch, hardware(1), image_bytes)}]
    if over:
        raise UserError(f"{over[0]!r} overrides settings of a stage, and {path} is a plan; change its set tables")
    return [
        {
            "name": stage.table.name,
            **estimate_stage(stage.settings, classes, epoch, hardware(stage.table.ranks), image_bytes),
        }
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
    for each in found:
        if "memory" in each:
            print()
            _print_memory(each)


KINDS = {
    "weights": "weights", "masters": "masters", "optimizer": "optimizer states", "ema": "moving average",
    "gradients": "gradients", "buffers": "buffers", "batch": "batch", "activations": "activations",
    "working": "working memory", "loader": "batches ahead", "checkpoint": "copy to save",
}  # fmt: skip


def _print_memory(each: dict[str, Any]) -> None:
    """Print memory of a rank, disk and time of one stage, in lines that fit any terminal."""
    gpu = f" x {each['gpu']}" if "gpu" in each else " ranks"
    settings = [f"ZeRO {each['zero_stage']}", each["precision"]]
    settings.append(f"micro-batch {each['micro_batch']} x {each['accumulation']}")
    if every := each["recompute_every"]:
        settings.append("every block recomputed" if every == 1 else f"every {every}th block recomputed")
    if where := [name for name in ("optimizer", "parameters") if each[f"offload_{name}"]]:
        settings.append(f"{' and '.join(where)} offloaded")
    print(f"{each['name']} on {each['ranks']}{gpu}: {', '.join(settings)}")
    memory = each["memory"]
    places = {"device": "GPU" if "gpu" in each else "device", "host": "host", "disk": "NVMe"}
    shown = {place: title for place, title in places.items() if memory[place]}
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    table.add_column("GB of a rank")
    for title in shown.values():
        table.add_column(title, justify="right")
    for kind, title in KINDS.items():
        if any(kind in memory[place] for place in shown):
            table.add_row(
                title, *(f"{memory[place][kind] / 1e9:.2f}" if kind in memory[place] else "" for place in shown)
            )
    totals = [memory["device_peak"], *(sum(memory[place].values()) for place in list(shown)[1:])]
    table.add_row("most at once", *(f"{total / 1e9:.2f}" for total in totals))
    Console(width=60, highlight=False).print(table)
    if "gpu" in each:
        best, room = each["largest_micro_batch"], f"{100 * ROOM:.0f} % of {each['gpu_bytes'] / 1e9:.0f} GB"
        fits = "fits into" if each["fits"] else "does not fit into"
        print(f"{fits} {room}; " + (f"the largest micro-batch that fits is {best}" if best else "no micro-batch does"))
        print(
            f"at {100 * each['utilisation']:.0f} % of peak: {each['images_per_second']:,.0f} images/s, "
            f"{each['days']:,.2f} days, {each['ranks'] * each['days'] * 24:,.0f} GPU hours"
        )
    print(f"checkpoint {each['checkpoint_bytes'] / 1e9:.2f} GB")
    size = f"{each['image_bytes'] / 1e3:,.0f} kB an image{' (assumed)' if each['image_bytes_assumed'] else ''}"
    whole = f"{each['shard_bytes'] / 1e12:,.2f} TB" if each["shard_bytes"] else "of unknown size"
    pace = f", read at {each['shard_bytes_per_second'] / 1e9:,.2f} GB/s" if "gpu" in each else ""
    print(f"shards {whole}, {size}{pace}")
    print(
        f"shuffle window {each['shuffle_window_bytes'] / 1e9:.2f} GB, of remote shards without a cache "
        f"{each['shuffle_window_bytes_of_rank'] / 1e9:.2f} GB a rank"
    )
