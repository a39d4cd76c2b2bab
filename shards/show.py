"""A contact sheet: a few images of each class on one page."""

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shards.atomic import whole_file
from shards.dataset import Dataset, Sample
from shards.errors import UserError

TILE = 96  # pixels, longest side of an image on the sheet
GAP = 4
NAME_WIDTH = 160
COLUMNS = 12  # at most, images a class


def show(dataset: Dataset, out: str | Path, samples: int = 96) -> list[str]:
    """Write a contact sheet PNG: a row for each class with its name, the same images every time.

    Args:
        dataset: Where the images come from. Of many classes only the first ``samples`` get a row.
        out: The PNG to write.
        samples: At most so many images on the sheet, dealt evenly to the classes.

    Returns:
        The keys of the images on the sheet, row by row.

    Raises:
        UserError: ``samples`` is below 1, nothing is there to show, ``out`` is no PNG, or an image is broken.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: must be at least 1")
    if Path(out).suffix.lower() != ".png":
        raise UserError(f"contact sheet {out}: the name must end in .png")
    rows = _first_of_each_class(dataset, samples)
    if not rows:
        raise UserError(f"{dataset.url} has no samples to show; build it again with less left out")
    width = NAME_WIDTH + max(map(len, rows.values())) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, len(rows) * (TILE + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, (label, members) in enumerate(rows.items()):
        top = GAP + row * (TILE + GAP)
        name = dataset.classes[label] if label >= 0 else "(no label)"
        while draw.textlength(name, font) > NAME_WIDTH - 2 * GAP:
            name = name.removesuffix("…")[:-1] + "…"
        draw.text((GAP, top + TILE // 2), name, fill="black", font=font, anchor="lm")
        for column, sample in enumerate(members):
            tile = _tile(sample, dataset.url)
            left = NAME_WIDTH + column * (TILE + GAP)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    with whole_file(out) as partial:
        sheet.save(partial, format="PNG")
    return [sample.key for members in rows.values() for sample in members]


def _first_of_each_class(dataset: Dataset, samples: int) -> dict[int, list[Sample]]:
    """Return the first samples of each label in stored order, which is shuffled already."""
    shown = min(len(dataset.classes), samples)
    each = min(max(1, samples // max(1, shown)), COLUMNS)
    places: dict[int, list[tuple[int, int]]] = {label: [] for label in range(shown)}
    for shard in range(len(dataset.shard_sizes)):
        for index, labels in enumerate(dataset.rows(shard).labels):
            label = labels[0] if labels else -1
            if len(places.get(label, ())) < each and label < shown:
                places.setdefault(label, []).append((shard, index))
        if all(len(found) == each for found in places.values()):
            break
    return {label: [dataset.read(*place) for place in found] for label, found in places.items() if found}


def _tile(sample: Sample, url: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(sample.image)) as image:
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {sample.key} of {url} does not decode ({error}); drop it") from error
    image.thumbnail((TILE, TILE))
    on_white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(on_white, image).convert("RGB")
