"""A contact sheet: some images of a data set on one page, by class or by key."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from shards.atomic import whole_file
from shards.dataset import Dataset, Sample
from shards.decode import DecodeError, decode
from shards.errors import UserError
from shards.store import local_path

TILE = 128  # pixels, longest side of an image on the sheet
GAP = 8
LINE = 16  # height of a line of a caption
HEADING = 30
COLUMNS = 10
SYSTEM_FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")  # Pillow's own knows ASCII alone
INK, SOFT = "black", "#5b6673"
LOOKED_AT, NEAR = 100_000, 1000  # keys among which the nearest to an unknown one is sought


class _Place(NamedTuple):
    """A kept sample by its shard and its place in there."""

    shard: int
    index: int  # type: ignore[assignment]  # of a tuple it is a method


class _Group(NamedTuple):
    """Images under one heading; without one, each tile says its class."""

    heading: str
    samples: list[Sample]


def show(
    dataset: Dataset,
    out: str | Path,
    samples: int = 96,
    classes: Sequence[str] = (),
    keys: Sequence[str] = (),
) -> list[str]:
    """Write a contact sheet PNG, the same every time: images of each class, or those asked for by key.

    Args:
        dataset: Where the images come from.
        out: The PNG to write.
        samples: At most so many images, dealt evenly to the classes: the first ones as stored, which is shuffled.
            Of more classes than that, as many as fit, spread over the list of classes.
        classes: Only images with these labels; each a name, or several between commas.
        keys: Exactly these samples, in this order; then ``samples`` does not count.

    An image that does not decode gets a red tile that says so.

    Returns:
        The keys of the images on the sheet, row by row.

    Raises:
        UserError: No such class or key, nothing is there to show, or an argument is wrong.
    """
    if samples < 1:
        raise UserError(f"--samples {samples}: must be at least 1")
    out = local_path(out, "contact sheet")
    if out.suffix.lower() != ".png":
        raise UserError(f"contact sheet {out}: the name must end in .png")
    if keys and classes:
        raise UserError("--key and --class together: give one of them")
    if keys:
        groups = [_Group("", [dataset.read(*place) for place in _find(dataset, keys)])]
    else:
        groups = _by_class(dataset, samples, classes)
    sheet = _draw(dataset, groups)
    try:
        with whole_file(out) as partial:
            sheet.save(partial, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; choose another place") from error
    return [sample.key for group in groups for sample in group.samples]


def _by_class(dataset: Dataset, samples: int, classes: Sequence[str]) -> list[_Group]:
    """Return a group for each class; a single one if no class has more than one image."""
    wanted = list(dict.fromkeys(label for names in classes for label in _labels_of(dataset, names)))
    if len(wanted) > samples:
        raise UserError(f"--samples {samples} for {len(wanted)} classes; give --samples {len(wanted)} or more")
    dealt = _deal(_first_of_each(dataset, wanted, samples), samples)
    if not any(dealt.values()):
        raise UserError(f"{dataset.url} has no such samples to show; choose other classes or another drop list")
    read = {label: [dataset.read(*place) for place in places] for label, places in dealt.items()}
    if all(len(places) == 1 for places in dealt.values()) and not wanted:
        return [_Group("", [sample for found in read.values() for sample in found])]
    return [_Group(_name(dataset, label), found) for label, found in read.items()]


def _first_of_each(dataset: Dataset, wanted: list[int], samples: int) -> dict[int, list[_Place]]:
    """Return the first places of each label in stored order, by label (-1: no label); enough to deal from."""
    labels = wanted or list(range(len(dataset.classes))) or [-1]
    found: dict[int, list[_Place]] = {label: [] for label in (labels if wanted else [*labels, -1])}
    each = -(-samples // len(labels))
    for shard in range(len(dataset.shard_sizes)):
        for label, index in _labels(dataset.table(shard, ["labels"])["labels"]):
            if label in found and len(found[label]) < samples:
                found[label].append(_Place(shard, index))
        if sum(len(found[label]) >= each for label in labels) >= min(samples, len(labels)):
            break
    return found


def _labels(labels: pa.ChunkedArray) -> Iterator[tuple[int, int]]:
    """Yield (label, index) of the samples in order; -1 for one without labels, each label of one with several."""
    lengths = pc.list_value_length(labels).to_numpy()
    flat = iter(pc.list_flatten(labels).to_pylist())
    for index, length in enumerate(lengths.tolist()):
        if not length:
            yield -1, index
        for label in islice(flat, length):
            yield label, index


def _deal(found: dict[int, list[_Place]], samples: int) -> dict[int, list[_Place]]:
    """Give each label one place in turn until there are ``samples``; none of them is dealt twice."""
    labels = sorted((label for label, places in found.items() if places), key=lambda label: (label < 0, label))
    if len(labels) > samples:
        labels = [labels[i * len(labels) // samples] for i in range(samples)]
    dealt: dict[int, list[_Place]] = {label: [] for label in labels}
    used: set[_Place] = set()
    left = {label: iter(found[label]) for label in labels}
    while left and len(used) < samples:
        for label in list(left)[: samples - len(used)]:
            place = next((place for place in left[label] if place not in used), None)
            if place is None:
                del left[label]
            else:
                dealt[label].append(place)
                used.add(place)
    return {label: sorted(places) for label, places in dealt.items() if places}


def _labels_of(dataset: Dataset, names: str) -> list[int]:
    """Return the labels of a class, or of several between commas; the names of some classes have commas themselves.

    Two classes may share a name, as the two cranes of ImageNet do: then both are meant.
    """
    labels = []
    for name in [names] if names in dataset.classes else [name.strip() for name in names.split(",")]:
        if name not in dataset.classes:
            raise UserError(f"{dataset.url} has no class {name!r}{_nearest(name, dataset.classes)}")
        labels += [label for label, other in enumerate(dataset.classes) if other == name]
    return labels


def _find(dataset: Dataset, keys: Sequence[str]) -> list[_Place]:
    """Return where each key is first."""
    wanted = list(dict.fromkeys(keys))
    found: dict[str, _Place] = {}
    near: list[str] = []  # what may have been meant: keys with the same last part, or any of the first ones
    looked_at: list[str] = []
    for shard in range(len(dataset.shard_sizes)):
        column = dataset.table(shard, ["key"])["key"]
        for index in np.flatnonzero(pc.is_in(column, pa.array(wanted)).to_numpy()).tolist():
            found.setdefault(column[index].as_py(), _Place(shard, index))
        if len(found) == len(wanted):
            return [found[key] for key in wanted]
        for key in wanted:
            if key not in found and len(near) < NEAR:
                near += column.filter(pc.match_substring(column, _last_part(key))).slice(0, 10).to_pylist()
        looked_at += column.slice(0, LOOKED_AT - len(looked_at)).to_pylist()
    missing = next(key for key in wanted if key not in found)
    raise UserError(f"{dataset.url} has no key {missing!r}{_nearest(missing, near + looked_at)}")


def _last_part(key: str) -> str:
    """Return the last part of a key, less an extension that a user may have left on it."""
    return key.rpartition("/")[2].partition(".")[0]


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
    return f"; did you mean {near[0]!r}?" if near else "; `patchmill shards stats` tells what there is"


def _name(dataset: Dataset, label: int) -> str:
    return dataset.classes[label] if label >= 0 else "(no label)"


def _draw(dataset: Dataset, groups: list[_Group]) -> Image.Image:
    """Lay the groups out below each other, ``COLUMNS`` tiles a row, each with its caption."""
    columns = min(COLUMNS, max(len(group.samples) for group in groups))
    lines = 1 if groups[0].heading else 2
    row = TILE + lines * LINE + GAP
    heights = [(HEADING if group.heading else 0) + -(-len(group.samples) // columns) * row for group in groups]
    width = max(columns, 2) * (TILE + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for group, height in zip(groups, heights, strict=True):
        first = top
        if group.heading:
            _text(draw, group.heading, GAP, top, 17, INK, width - 2 * GAP)
            first += HEADING
        for index, sample in enumerate(group.samples):
            left = GAP + index % columns * (TILE + GAP)
            upper = first + index // columns * row
            tile = _tile(sample)
            sheet.paste(tile, (left + (TILE - tile.width) // 2, upper + (TILE - tile.height) // 2))
            caption = [sample.key.rpartition("/")[2]]
            if not group.heading:
                caption.insert(0, ", ".join(_name(dataset, label) for label in sample.labels or (-1,)))
            for line, (text, colour) in enumerate(zip(caption, (INK, SOFT)[-lines:], strict=True)):
                _text(draw, text, left, upper + TILE + 2 + line * LINE, 12, colour, TILE)
        top += height
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in SYSTEM_FONTS:
        with suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _text(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, size: int, colour: str, width: int) -> None:
    """Draw a line of text; of one that is too long, both ends, since keys differ at their ends."""
    text = " ".join(text.split())
    kept, shown = len(text), text
    while draw.textlength(shown, _font(size)) > width:
        kept -= 1
        shown = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
    draw.text((left, top), shown, fill=colour, font=_font(size))


def _tile(sample: Sample) -> Image.Image:
    try:
        image = Image.fromarray(decode(sample.image, sample.key))
    except DecodeError:
        image = Image.new("RGB", (TILE, TILE), "#fbe3e1")
        ImageDraw.Draw(image).text((TILE / 2, TILE / 2), "cannot decode", "#b3261e", _font(12), anchor="mm")
    image.thumbnail((TILE, TILE))
    return image
