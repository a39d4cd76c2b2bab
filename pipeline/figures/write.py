"""All figures that can be drawn of a model, as PNG files."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline import distributed
from pipeline.convert.checkpoint import find_checkpoint
from pipeline.convert.recognise import load_model
from pipeline.figures import distance, filters, positions, reconstruction, rollout
from pipeline.figures.attention import attends_to_all
from pipeline.figures.canvas import png
from pipeline.figures.pictures import read_pictures
from pipeline.images import to_model_input
from pipeline.models.resnet import ResNet
from pipeline.writable import make_writable, writing
from shards.atomic import whole_file
from shards.dataset import Dataset

SHOWN = 8  # images


class Drawn(NamedTuple):
    """A figure: its name, the PNG, or None and why there is none."""

    name: str
    data: bytes | None
    why_not: str = ""
    wants_images: bool = False  # and there were none


def draw_figures(source: str | Path, images: str | Dataset | None, ema: bool = False) -> Iterator[Drawn]:
    """Draw figure by figure what can be drawn of a model.

    Args:
        source: Checkpoint, folder of a training stage, or weights.
        images: What ``read_pictures`` reads; None: only what needs none.
        ema: Of the moving average of the weights.
    """
    model, _ = load_model(source, ema)
    model.to(distributed.device())
    yield Drawn("filters", png(filters.draw(model)))
    if isinstance(model, ResNet):
        yield Drawn("positions", None, "the model has no tokens")
        return
    table = positions.position_table(model)
    if table is None:
        yield Drawn("positions", None, f"its positions are {model.position!r}, and nothing is added to patches")
    else:
        yield Drawn("positions", png(positions.draw(table)))
    if images is None:
        for name in ("distance", "rollout", *(["reconstruction"] if reconstruction.tells_patches(model) else [])):
            yield Drawn(name, None, "it wants images: give --images", wants_images=True)
        return
    pixels = read_pictures(images, distance.IMAGES, model.image_size)
    inputs = to_model_input(pixels, distributed.device())
    if attends_to_all(model):
        found = distance.attention_distances(model, inputs)
        yield Drawn("distance", png(distance.draw(found, model.grid, model.image_size // model.grid, len(inputs))))
        yield Drawn("rollout", png(rollout.draw(model, inputs[:SHOWN], pixels[:SHOWN])))
    else:
        for name in ("distance", "rollout"):
            yield Drawn(name, None, "its tokens see those of their row or column alone")
    if reconstruction.tells_patches(model):
        normed = not model.patch_target and find_checkpoint(source).state["settings"]["mae"]["norm_pixels"]
        yield Drawn("reconstruction", png(reconstruction.draw(model, inputs[:SHOWN], normed)))


def write_figures(source: str | Path, out: Path, images: str | None, ema: bool = False) -> dict[str, str]:
    """Write ``NAME.png`` into a folder for each figure; return by name the path, or why there is none.

    Raises:
        UserError: The folder cannot be written.
    """
    make_writable(out)
    found = {}
    for each in draw_figures(source, images, ema):
        if each.data is None:
            found[each.name] = f"none: {each.why_not}"
        else:
            path = out / f"{each.name}.png"
            with writing(out), whole_file(path) as partial:
                partial.write_bytes(each.data)
            found[each.name] = str(path)
    return found
