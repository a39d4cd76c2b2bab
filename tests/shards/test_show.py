"""The contact sheet shows what it says it shows."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.show import COLUMNS, GAP, HEADING, LINE, TILE, show
from tests.shards.datasets import Made, plain, write_dataset

COLOURS = {"blue": (0, 0, 255), "green, dark": (0, 128, 0), "red": (255, 0, 0)}
CLASSES = list(COLOURS)


def tile(colour: tuple) -> bytes:
    return plain(colour, (TILE, TILE))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    made = [Made(f"{name}/{i}", tile(COLOURS[name]), (CLASSES.index(name),)) for i in range(5) for name in CLASSES]
    made += [Made("red/twice", tile((9, 9, 9)), (2, 0)), Made("none", tile((250, 250, 250)), ())]
    folder = tmp_path_factory.mktemp("show") / "set"
    return Dataset.open(write_dataset(folder, CLASSES, [made[:4], made[4:9], made[9:]]))


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def names(keys: list[str]) -> list[str]:
    return [key.split("/")[0] for key in keys]


def test_images_of_each_class_below_its_name(dataset, tmp_path):
    keys = show(dataset, tmp_path / "sheet.png", samples=9)
    assert names(keys) == [name for name in CLASSES for _ in range(3)]
    assert len(set(keys)) == 9
    sheet = pixels(tmp_path / "sheet.png")
    row = HEADING + TILE + LINE + GAP
    assert sheet.shape == (3 * row + GAP, 3 * (TILE + GAP) + GAP, 3)
    for index, colour in enumerate(COLOURS.values()):
        top = GAP + index * row
        for column in range(3):
            left = GAP + column * (TILE + GAP)
            assert (sheet[top + HEADING : top + HEADING + TILE, left : left + TILE] == colour).all()
            assert sheet[top + HEADING + TILE : top + row - GAP, left : left + TILE].min() < 128  # its caption
        assert sheet[top : top + HEADING].min() < 128  # the name of the class


def test_same_sheet_every_time_and_nothing_beside_it(dataset, tmp_path):
    assert show(dataset, tmp_path / "one.png") == show(Dataset.open(dataset.url), tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.png", "two.png"]


def test_everything_at_most_once_and_what_has_no_label_last(dataset, tmp_path):
    keys = show(dataset, tmp_path / "sheet.png", samples=1000)
    assert len(keys) == len(set(keys)) == len(dataset)
    assert keys[-1] == "none"


def test_a_rare_class_leaves_its_share_to_the_others(tmp_path):
    made = [Made(f"a/{i}", plain("red"), (0,)) for i in range(20)] + [Made("b/0", plain("blue"), (1,))]
    dataset = Dataset.open(write_dataset(tmp_path / "set", ["a", "b", "empty"], [made]))
    assert names(show(dataset, tmp_path / "sheet.png", samples=12)) == ["a"] * 11 + ["b"]


def test_fewer_samples_than_classes_are_spread_over_them(tmp_path):
    made = [Made(f"{label}/0", plain("red"), (label,)) for label in range(100)]
    dataset = Dataset.open(write_dataset(tmp_path / "set", [f"class {i}" for i in range(100)], [made]))
    assert names(show(dataset, tmp_path / "sheet.png", samples=5)) == ["0", "20", "40", "60", "80"]
    assert pixels(tmp_path / "sheet.png").shape[0] == TILE + 2 * LINE + 2 * GAP  # no headings: one row
    show(dataset, tmp_path / "all.png", samples=100)
    assert pixels(tmp_path / "all.png").shape[1] == COLUMNS * (TILE + GAP) + GAP


def test_only_the_classes_asked_for(dataset, tmp_path):
    keys = show(dataset, tmp_path / "sheet.png", samples=8, classes=["red", "green, dark"])
    assert names(keys) == ["green, dark"] * 4 + ["red"] * 4
    assert names(show(dataset, tmp_path / "two.png", samples=4, classes=["red,blue"])) == ["blue"] * 2 + ["red"] * 2
    every = show(dataset, tmp_path / "blue.png", samples=99, classes=["blue"])
    assert every == [*(f"blue/{i}" for i in range(5)), "red/twice"]  # a second label counts


def test_exactly_the_keys_asked_for(dataset, tmp_path):
    wanted = ["red/4", "none", "blue/0", "red/4"]
    assert show(dataset, tmp_path / "sheet.png", samples=1, keys=wanted) == ["red/4", "none", "blue/0"]
    sheet = pixels(tmp_path / "sheet.png")
    middles = [GAP + column * (TILE + GAP) + TILE // 2 for column in range(3)]
    assert sheet[GAP + TILE // 2, middles].tolist() == [[255, 0, 0], [250, 250, 250], [0, 0, 255]]


def test_dropped_samples_are_not_shown(dataset, tmp_path):
    write_exclude(dataset.url, "v1", [(0, 0, "x")])
    kept = Dataset.open(dataset.url, exclude="v1")
    assert "blue/0" not in show(kept, tmp_path / "sheet.png", samples=1000)
    with pytest.raises(UserError, match="no key 'blue/0'; did you mean 'blue/"):
        show(kept, tmp_path / "sheet.png", keys=["blue/0"])


def test_long_names_turned_and_broken_images(tmp_path):
    file = io.BytesIO()
    turned = Image.new("RGB", (40, 20), "white")
    turned.paste("red", (0, 0, 20, 20))  # stored: red left; upright: red top
    turned.save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    palette = io.BytesIO()
    Image.new("P", (300, 5)).save(palette, "PNG")
    whole = plain("red", (64, 64))
    body = whole.index(b"IDAT")
    chunk = b"IDAT" + bytes(10)  # no zlib stream, though its checksum is right
    broken = whole[: body - 4] + struct.pack(">I", 10) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[-12:]
    long = "long name " * 30
    made = [Made("k" * 300, file.getvalue()), Made("a", palette.getvalue()), Made("日本 ünï", broken)]
    dataset = Dataset.open(write_dataset(tmp_path / "set", [long], [made]))
    assert len(show(dataset, tmp_path / "sheet.png")) == 3
    sheet = pixels(tmp_path / "sheet.png").astype(int)
    assert sheet.shape[1] == 3 * (TILE + GAP) + GAP
    middle = GAP + TILE // 2
    upper, lower = sheet[GAP + HEADING + TILE // 2 - 12, middle], sheet[GAP + HEADING + TILE // 2 + 12, middle]
    assert upper[1] < 60 < 200 < lower[1]
    assert np.abs(sheet[GAP + HEADING + 5, -GAP - TILE + 5] - [0xFB, 0xE3, 0xE1]).max() == 0  # said to be broken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "--samples 0"),
        ({"classes": ["rd"]}, "no class 'rd'; did you mean 'red'"),
        ({"classes": ["red,bleu"]}, "no class 'bleu'; did you mean 'blue'"),
        ({"classes": ["red", "blue"], "samples": 1}, "--samples 1 for 2 classes; give --samples 2"),
        ({"classes": ["red"], "keys": ["red/1"]}, "--key and --class together"),
        ({"keys": ["red/1", "twice.png"]}, "no key 'twice.png'; did you mean 'red/twice'"),
        ({"keys": ["rde/3"]}, "no key 'rde/3'; did you mean 'red/3'"),
        ({"keys": ["@@@@@@@@"]}, "no key '@@@@@@@@'; `patchmill shards stats` tells"),
    ],
)
def test_mistakes_are_named(dataset, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        show(dataset, tmp_path / "sheet.png", **arguments)
    assert os.listdir(tmp_path) == []


def test_classes_that_share_a_name_are_all_shown(tmp_path):
    made = [Made(f"{label}/{i}", plain("red"), (label,)) for i in range(2) for label in range(3)]
    cranes = Dataset.open(write_dataset(tmp_path / "set", ["crane", "dog", "crane"], [made]))
    assert names(show(cranes, tmp_path / "sheet.png", classes=["crane"])) == ["0", "0", "2", "2"]


def test_places_that_cannot_be_written(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"contact sheet s3://bucket/sheet\.png: must be a local path"):
        show(dataset, "s3://bucket/sheet.png")
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match=r"must end in \.png"):
        show(dataset, tmp_path / "sheet.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        show(dataset, tmp_path / "file" / "sheet.png")


def test_nothing_to_show(dataset, tmp_path):
    sizes = enumerate([4, 5, 8])
    write_exclude(dataset.url, "all", [(shard, i, "x") for shard, size in sizes for i in range(size)])
    with pytest.raises(UserError, match="no such samples to show"):
        show(Dataset.open(dataset.url, exclude="all"), tmp_path / "sheet.png")


def test_a_set_without_classes(tmp_path):
    made = [Made(f"{i}", plain("red"), ()) for i in range(6)]
    dataset = Dataset.open(write_dataset(tmp_path / "set", [], [made[:2], made[2:]]))
    assert show(dataset, tmp_path / "sheet.png", samples=5) == ["0", "1", "2", "3", "4"]
