"""What is in a data set, from its sample tables alone: no image is read."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from rich.console import Group
from rich.table import Table

from shards.dataset import Dataset

PERCENTS = (0, 5, 50, 95, 100)
BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Stats:
    """Counts over the kept samples of a data set.

    Attributes:
        url: Where the data set is.
        samples: Their number.
        shards: Number of shards.
        classes: Samples of each class, by name, in label order.
        formats: Images of each format.
        labels_per_image: How many images have so many labels.
        bytes: Of all images.
        percentiles: ``width``, ``height`` (pixels) and ``bytes`` of an image at 0, 5, 50, 95 and 100 %.
    """

    url: str
    samples: int
    shards: int
    classes: dict[str, int]
    formats: dict[str, int]
    labels_per_image: dict[int, int]
    bytes: int
    percentiles: dict[str, list[int]]


def stats(dataset: Dataset) -> Stats:
    """Count what is in a data set; reads every sample table once."""
    classes = np.zeros(len(dataset.classes), np.int64)
    formats: Counter[str] = Counter()
    labels_per_image: Counter[int] = Counter()
    columns = {"width": [], "height": [], "bytes": []}
    for shard in range(len(dataset.shard_sizes)):
        rows = dataset.rows(shard)
        for column, values in zip(columns.values(), (rows.width, rows.height, rows.size), strict=True):
            column.append(values)
        formats.update(rows.format)
        for labels, count in Counter(rows.labels).items():
            labels_per_image[len(labels)] += count
            classes[list(labels)] += count
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Stats(
        url=dataset.url,
        samples=len(dataset),
        shards=len(dataset.shard_sizes),
        classes=dict(zip(dataset.classes, classes.tolist(), strict=True)),
        formats=dict(sorted(formats.items())),
        labels_per_image=dict(sorted(labels_per_image.items())),
        bytes=int(whole["bytes"].sum()),
        percentiles={
            name: np.percentile(values, PERCENTS, method="nearest").tolist() if len(values) else []
            for name, values in whole.items()
        },
    )


def render(found: Stats) -> Group:
    """Return the tables to print on a terminal with rich."""
    total = Table(title=found.url, show_header=False)
    total.add_row("samples", f"{found.samples:,}")
    total.add_row("shards", f"{found.shards:,}")
    total.add_row("classes", f"{len(found.classes):,}")
    total.add_row("image bytes", f"{found.bytes:,}")
    total.add_row("formats", ", ".join(f"{name} {count:,}" for name, count in found.formats.items()))
    labels = (f"{count:,} with {number}" for number, count in found.labels_per_image.items())
    total.add_row("labels an image", ", ".join(labels))

    sizes = Table("an image's", *(f"{percent} %" for percent in PERCENTS), title="percentiles")
    for name, values in found.percentiles.items():
        sizes.add_row(name, *(f"{value:,}" for value in values))

    classes = Table("class", "images", "", title="classes")
    longest = max(found.classes.values(), default=0)
    for name, count in found.classes.items():
        classes.add_row(name, f"{count:,}", "█" * round(BAR * count / max(longest, 1)))
    return Group(total, sizes, classes)
