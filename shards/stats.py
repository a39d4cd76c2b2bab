"""What is in a data set, from its sample tables alone: no image is read."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards import manifest
from shards.dataset import Dataset
from shards.histogram import Bar, Histogram
from shards.progress import ImageProgress
from shards.repeats import Repeats, repeats

PERCENTS = (0, 5, 25, 50, 75, 95, 100)
COLUMNS = ["size", "format", "labels", "width", "height", "orientation"]
SQUARE, STEPS = 32 << 10, 1 << 10
"""An aspect ratio is counted as a whole number: that of a square plus 1,024 for each doubling."""


@dataclass(frozen=True)
class Stats:
    """Counts over the kept samples of a data set. Sizes are as stored: EXIF orientation is not applied.

    Attributes:
        url: Where the data set is.
        exclude: The version of its drop list in use, or None.
        samples: Their number.
        shards: Number of shards.
        bytes: Of all images.
        classes: Name and samples of each class, in label order (two may share a name); weights of labels do not count.
        unlabelled: Samples without a label.
        labels_per_image: How many images have so many labels.
        formats: Images of each format.
        orientations: Images of each EXIF orientation of their source, 1 to 8 (1: upright or none).
        percentiles: ``width``, ``height``, ``short side`` (pixels), ``aspect`` (width / height) and ``bytes`` of an
            image at 0, 5, 25, 50, 75, 95 and 100 %. Aspect to 0.1 %; the others exactly below 131,072, and to 1 in
            65,536 above.
        histograms: The same quantities as bars of equal ratio.
        repeated_keys: Keys that occur more than once.
        repeated_images: Images that are there more than once, byte for byte.
        rejected: How many images of the source were left out, by reason, the most frequent first.
    """

    url: str
    exclude: str | None
    samples: int
    shards: int
    bytes: int
    classes: list[tuple[str, int]]
    unlabelled: int
    labels_per_image: dict[int, int]
    formats: dict[str, int]
    orientations: dict[int, int]
    percentiles: dict[str, list[float]]
    histograms: dict[str, list[Bar]]
    repeated_keys: Repeats
    repeated_images: Repeats
    rejected: dict[str, int]


def stats(dataset: Dataset, progress: bool = False) -> Stats:
    """Count what is in a data set; memory is 8 bytes a sample and a few megabytes.

    Args:
        dataset: Its drop list counts as not there.
        progress: Show progress bars on stderr, one for each time the sample tables are read.
    """
    classes = np.zeros(len(dataset.classes), np.int64)
    formats: Counter[str] = Counter()
    orientations: Counter[int] = Counter()
    labels_per_image: Counter[int] = Counter()
    rejected: Counter[str] = Counter()
    sizes = {name: Histogram() for name in ("width", "height", "short side", "aspect", "bytes")}
    with ImageProgress("counting", len(dataset), show=progress) as bar:
        for shard in range(len(dataset.shard_sizes)):
            table = dataset.table(shard, COLUMNS)
            width, height, size = (table[name].to_numpy() for name in ("width", "height", "size"))
            aspect = np.rint(STEPS * np.log2(width / height)).astype(np.int64) + SQUARE
            every = (width, height, np.minimum(width, height), aspect, size)
            for histogram, values in zip(sizes.values(), every, strict=True):
                histogram.add(values)
            classes += np.bincount(pc.list_flatten(table["labels"]).to_numpy(), minlength=len(classes))
            _count(labels_per_image, pc.list_value_length(table["labels"]))
            _count(formats, table["format"])
            _count(orientations, table["orientation"])
            receipt = manifest.receipt_of(table, dataset.store, manifest.samples_path(shard))
            rejected.update(reason for _, reason in receipt.rejected)
            bar.advance(len(table), int(size.sum()))
    histograms = {name: histogram.bars() for name, histogram in sizes.items()}
    histograms["aspect"] = _aspect_bars(sizes["aspect"])
    percentiles: dict[str, list[float]] = {
        name: [histogram.percentile(percent) for percent in PERCENTS] if len(dataset) else []
        for name, histogram in sizes.items()
    }
    percentiles["aspect"] = [_ratio(number) for number in percentiles["aspect"]]
    return Stats(
        url=dataset.url,
        exclude=dataset.exclude,
        samples=len(dataset),
        shards=len(dataset.shard_sizes),
        bytes=sizes["bytes"].sum,
        classes=list(zip(dataset.classes, classes.tolist(), strict=True)),
        unlabelled=labels_per_image[0],
        labels_per_image=dict(sorted(labels_per_image.items())),
        formats=dict(sorted(formats.items())),
        orientations=dict(sorted(orientations.items())),
        percentiles=percentiles,
        histograms=histograms,
        repeated_keys=repeats(dataset, "key", progress),
        repeated_images=repeats(dataset, "xxh128", progress),
        rejected=dict(sorted(rejected.items(), key=lambda item: (-item[1], item[0]))),
    )


def _count(counter: Counter, values: pa.ChunkedArray) -> None:
    for found in values.value_counts().to_pylist():
        counter[found["values"]] += found["counts"]


def _ratio(number: float) -> float:
    return round(2 ** ((number - SQUARE) / STEPS), 4)


def _aspect_bars(aspect: Histogram) -> list[Bar]:
    """Return bars whose edges are powers of two, or of a root of it, so that a square begins one."""
    if aspect.least is None or aspect.greatest is None:
        return []
    spread = aspect.greatest - aspect.least
    width = next(width for width in (STEPS // 8, STEPS // 4, STEPS // 2, STEPS, 4 * STEPS) if spread < 30 * width)
    edges = list(range(aspect.least // width * width, aspect.greatest + width + 1, width))
    return [Bar(_ratio(low), _ratio(high), count) for low, high, count in aspect.bars_between(edges)]
