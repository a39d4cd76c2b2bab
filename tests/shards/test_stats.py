"""Statistics against counts made from the source files themselves."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from shards.build import build
from shards.dataset import Dataset, write_exclude
from shards.stats import render, stats
from tests.shards.images import make_source


@pytest.fixture
def source(tmp_path):
    make_source(tmp_path / "source", classes=3, each=9)
    (tmp_path / "source/class.1/im.0.jpg").unlink()
    return tmp_path / "source"


def test_counts_are_those_of_the_files(source, tmp_path):
    build(source, tmp_path / "out", shard_samples=5, workers=1)
    found = stats(Dataset.open(tmp_path / "out"))
    files = [path for path in source.rglob("im.*") if path.is_file()]
    assert found.samples == len(files) == 26
    assert found.classes == Counter(path.relative_to(source).parts[0] for path in files)
    assert list(found.classes) == ["class.0", "class.1", "class.2"]
    names = {"jpeg": "jpg"}
    extensions = (path.suffix[1:].lower() for path in files)
    assert found.formats == Counter(names.get(extension, extension) for extension in extensions)
    assert found.labels_per_image == {1: 26}
    assert found.bytes == sum(path.stat().st_size for path in files)
    widths = np.sort([Image.open(path).width for path in files])
    low, *_, high = found.percentiles["width"]
    assert (low, high) == (widths[0], widths[-1])
    assert found.percentiles["width"][2] in widths[12:14]


def test_dropped_samples_do_not_count(source, tmp_path):
    build(source, tmp_path / "out", workers=1)
    write_exclude(tmp_path / "out", "v1", [(0, index, "x") for index in range(20)])
    write_exclude(tmp_path / "out", "all", [(0, index, "x") for index in range(26)])
    found = stats(Dataset.open(tmp_path / "out", exclude="v1"))
    assert found.samples == sum(found.classes.values()) == sum(found.formats.values()) == 6
    nothing = stats(Dataset.open(tmp_path / "out", exclude="all"))
    assert (nothing.samples, nothing.bytes, nothing.percentiles["width"]) == (0, 0, [])
    Console(quiet=True).print(render(nothing))


def test_tables_show_the_numbers(source, tmp_path):
    build(source, tmp_path / "out", workers=1)
    console = Console(width=120)
    with console.capture() as capture:
        console.print(render(stats(Dataset.open(tmp_path / "out"))))
    text = capture.get()
    for part in ("samples", "26", "class.1", "jpg", "webp", "percentiles"):
        assert part in text
