"""Pets, flowers and VTAB-1k's tasks: little copies of their official layouts, built to the end."""

import numpy as np
import pytest
from scipy.io import savemat

from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from shards.sources.open import find_kind, open_source
from tests.shards.images import encode

BREEDS = ["Abyssinian", "american_bulldog", "Bengal"]


def pets(folder, train=3, test=2):
    """As images.tar.gz and annotations.tar.gz unpack, with what else is in them."""
    (folder / "images").mkdir(parents=True)
    (folder / "annotations/trimaps").mkdir(parents=True)
    lists = {"trainval": [], "test": []}
    for label, breed in enumerate(BREEDS):
        for number in range(1, train + test + 1):
            (folder / f"images/{breed}_{number}.jpg").write_bytes(encode(10 * label + number, "JPEG"))
            (folder / f"annotations/trimaps/{breed}_{number}.png").write_bytes(encode(0))
            name = "trainval" if number <= train else "test"
            lists[name].append(f"{breed}_{number} {label + 1} {1 + (label == 1)} {label + 1}\n")
    for name, lines in lists.items():
        (folder / f"annotations/{name}.txt").write_text("".join(lines))
    (folder / "annotations/list.txt").write_text(
        "#Image CLASS-ID SPECIES BREED ID\n" + "".join(lists["trainval"] + lists["test"])
    )
    (folder / "images/Abyssinian_100.mat").write_bytes(b"MATLAB")
    return folder


def flowers(folder, classes=4, each=3):
    (folder / "jpg").mkdir(parents=True)
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(1, classes + 1), each))
    for number in range(1, len(labels) + 1):
        (folder / f"jpg/image_{number:05d}.jpg").write_bytes(encode(number, "JPEG"))
    savemat(folder / "imagelabels.mat", {"labels": labels[None].astype(np.uint8)})
    ids = np.random.default_rng(1).permutation(len(labels)) + 1
    savemat(folder / "setid.mat", {"trnid": ids[None, :4], "valid": ids[None, 4:6], "tstid": ids[None, 6:]})
    return folder, labels, ids


def task(folder, classes=None):
    (folder / "images/train").mkdir(parents=True)
    (folder / "images/test").mkdir(parents=True)
    rows = {
        "train800": ["images/train/000000.jpg 2", "images/train/000001.png 0"],
        "val200": ["images/train/a b.jpg 11"],
    }
    rows["test"] = ["images/test/000000.jpg 2", "images/test/000001.jpg 1"]
    rows["train800val200"] = rows["train800"] + rows["val200"]
    for name, lines in rows.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for place, line in enumerate(lines):
            path = folder / line.rpartition(" ")[0]
            path.write_bytes(encode(hash(line) % 50 + place, "PNG" if path.suffix == ".png" else "JPEG"))
    if classes:
        (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    return folder


def everything(url):
    dataset = Dataset.open(url)
    samples = [dataset[place] for place in range(len(dataset))]
    return {each.key: (dataset.classes[each.labels[0]], each.image) for each in samples}


def test_pets_have_their_official_parts(tmp_path):
    source = pets(tmp_path / "pets")
    assert find_kind(str(source)) == "pets"
    build(source, tmp_path / "out", shard_samples=4, workers=1)
    assert Dataset.open(tmp_path / "out/train").classes == BREEDS
    for part, numbers in (("train", (1, 2, 3)), ("test", (4, 5))):
        assert everything(tmp_path / "out" / part) == {
            f"{breed}_{number}": (breed, (source / f"images/{breed}_{number}.jpg").read_bytes())
            for breed in BREEDS
            for number in numbers
        }


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("test", None, r"lacks annotations/test.txt; unpack images.tar.gz and annotations.tar.gz there"),
        ("test", "Bengal 3 1 3\n", r"line 1 of .*test.txt is 'Bengal 3 1 3', not as Abyssinian_1 1 1 1"),
        ("test", "Siamese_1 3 1 3\n", r"give one class several names, or leave some out"),
        ("trainval", "Bengal_1 9 1 3\n", r"give one class several names, or leave some out"),
    ],
)
def test_pets_whose_lists_are_wrong(tmp_path, name, text, error):
    source = pets(tmp_path / "pets")
    path = source / f"annotations/{name}.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=error):
        open_source(source, "pets", unpacked=tmp_path / "u")


def test_flowers_have_their_official_parts(tmp_path):
    source, labels, ids = flowers(tmp_path / "flowers")
    assert find_kind(str(source)) == "flowers"
    build(source, tmp_path / "out", shard_samples=4, workers=1)
    for part, numbers in (("train", ids[:4]), ("val", ids[4:6]), ("test", ids[6:])):
        assert Dataset.open(tmp_path / "out" / part).classes == ["001", "002", "003", "004"]
        assert everything(tmp_path / "out" / part) == {
            f"image_{number:05d}": (
                f"{labels[number - 1]:03d}", (source / f"jpg/image_{number:05d}.jpg").read_bytes()
            )
            for number in numbers
        }  # fmt: skip


def test_flowers_whose_lists_are_wrong(tmp_path):
    source, _, _ = flowers(tmp_path / "flowers")
    (source / "imagelabels.mat").rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"lacks imagelabels.mat; get it from the page"):
        open_source(source, unpacked=tmp_path / "u")
    (source / "imagelabels.mat").write_bytes(b"MATLAB 5.0 MAT-file, cut short")
    with pytest.raises(UserError, match=r"imagelabels.mat is damaged, or another file: .*; get it again"):
        open_source(source, unpacked=tmp_path / "u")
    savemat(source / "imagelabels.mat", {"labels": np.ones((1, 5), np.uint8)})
    with pytest.raises(UserError, match=r"setid.mat and imagelabels.mat of .* do not fit each other"):
        open_source(source, unpacked=tmp_path / "u")


@pytest.mark.parametrize("names", [None, [f"texture {n}" for n in range(12)]])
def test_a_task_of_vtab_has_its_parts_and_names(tmp_path, names):
    source = task(tmp_path / "dtd", names)
    assert find_kind(str(source)) == "lists"
    build(source, tmp_path / "out", shard_samples=4, workers=1)
    names = names or [f"{n:02d}" for n in range(12)]
    found = {part: everything(tmp_path / "out" / part) for part in ("train800", "val200", "test")}
    for part, images in found.items():
        lines = (source / f"{part}.txt").read_text().splitlines()
        expected = {}
        for line in lines:
            path, _, label = line.rpartition(" ")
            expected[path.rpartition(".")[0]] = names[int(label)], (source / path).read_bytes()
        assert images == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (None, "lacks val200.txt; a task of VTAB-1k has train800.txt, val200.txt, test.txt"),
        ("", "val200.txt is empty"),
        ("images/train/x.jpg\n", r"line 1 of .*val200.txt is 'images/train/x.jpg', not as images/0001.jpg 3"),
        ("../secret.jpg 0\n", r"line 1 of .*val200.txt is '../secret.jpg 0', not as"),
        ("images/train/x.jpg 12\n", "have a class 12, and classes.txt 12 names; mend it"),
    ],
)
def test_a_task_of_vtab_whose_lists_are_wrong(tmp_path, text, error):
    source = task(tmp_path / "dtd", [f"t{n}" for n in range(12)])
    (source / "val200.txt").unlink() if text is None else (source / "val200.txt").write_text(text)
    with pytest.raises(UserError, match=error):
        open_source(source, "lists", unpacked=tmp_path / "u")
