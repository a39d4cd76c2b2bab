"""The contact sheet shows what it says it shows."""

import os

import numpy as np
import pytest
from PIL import Image

from shards.build import build
from shards.dataset import Dataset, write_exclude
from shards.errors import UserError
from shards.show import GAP, NAME_WIDTH, TILE, show

COLOURS = {"blue": (0, 0, 255), "green": (0, 128, 0), "red": (255, 0, 0)}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    for name, colour in COLOURS.items():
        (folder / "source" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (TILE, TILE), colour).save(folder / "source" / name / f"{i}.png")
    build(folder / "source", folder / "out", shard_samples=4, workers=1)
    return Dataset.open(folder / "out")


def test_a_row_for_each_class_with_its_name(dataset, tmp_path):
    keys = show(dataset, tmp_path / "sheet.png", samples=9)
    assert [key.split("/")[0] for key in keys] == [name for name in COLOURS for _ in range(3)]
    assert len(set(keys)) == 9
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image)
    step = TILE + GAP
    assert sheet.shape == (3 * step + GAP, NAME_WIDTH + 3 * step + GAP, 3)
    for row, colour in enumerate(COLOURS.values()):
        line = sheet[GAP + row * step + TILE // 2]
        assert all((line[NAME_WIDTH + column * step + TILE // 2] == colour).all() for column in range(3))
        assert sheet[GAP + row * step : (row + 1) * step, :NAME_WIDTH].min() < 128  # the name is drawn


def test_same_sheet_every_time_and_nothing_beside_it(dataset, tmp_path):
    assert show(dataset, tmp_path / "one.png") == show(Dataset.open(dataset.url), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.png", "two.png"]


def test_fewer_samples_than_classes(dataset, tmp_path):
    assert [key.split("/")[0] for key in show(dataset, tmp_path / "sheet.png", samples=2)] == [
        "blue",
        "green",
    ]


def test_long_names_palettes_and_turned_images(tmp_path):
    (tmp_path / "source" / ("long name " * 8)).mkdir(parents=True)
    folder = tmp_path / "source" / ("long name " * 8)
    Image.new("P", (5, 5)).save(folder / "palette.png")
    Image.new("I;16", (300, 5)).save(folder / "deep.png")
    Image.new("CMYK", (30, 50)).save(folder / "print.jpg")
    build(tmp_path / "source", tmp_path / "out", workers=1)
    assert len(show(Dataset.open(tmp_path / "out"), tmp_path / "sheet.png")) == 3


def test_mistakes(dataset, tmp_path):
    with pytest.raises(UserError, match="--samples 0"):
        show(dataset, tmp_path / "sheet.png", samples=0)
    with pytest.raises(UserError, match=r"must end in \.png"):
        show(dataset, tmp_path / "sheet.jpg")
    sizes = enumerate(dataset.shard_sizes.tolist())
    write_exclude(dataset.url, "all", [(shard, i, "x") for shard, size in sizes for i in range(size)])
    with pytest.raises(UserError, match="no samples to show"):
        show(Dataset.open(dataset.url, exclude="all"), tmp_path / "sheet.png")
    assert os.listdir(tmp_path) == []
