"""Pets, flowers, VTAB-1k's tasks and ObjectNet: little copies of their official layouts, built to the end."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from shards.build import build
from shards.dataset import Dataset
from shards.decode import decode
from shards.encode import Encoding
from shards.errors import UserError
from shards.sources.open import find_kind, open_source
from tests.shards.images import encode
from tests.shards.sources.servers import upload

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
        ("test", "# nothing\n", r"pets has no images in its part test; get it again"),
    ],
)
def test_pets_whose_lists_are_wrong(tmp_path, name, text, error):
    source = pets(tmp_path / "pets")
    path = source / f"annotations/{name}.txt"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=error):
        build(source, tmp_path / "out", kind="pets")
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize(
    ("sets", "error"),
    [
        ({"trnid": [1, 2], "valid": [3], "tstid": []}, r"flowers has no images in its part test; get it again"),
        ({"trnid": [], "valid": [], "tstid": []}, r"setid.mat and imagelabels.mat of .* do not fit each other"),
    ],
)
def test_flowers_without_images_in_a_part(tmp_path, sets, error):
    source, _, _ = flowers(tmp_path / "flowers")
    savemat(source / "setid.mat", {name: np.array([ids], np.uint8) for name, ids in sets.items()})
    with pytest.raises(UserError, match=error):
        build(source, tmp_path / "out")


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


# Of ImageNet's 1,000 names some; the others are made up. "crane" is the name of two classes, as it is in truth.
OUTPUTS = {
    409: "analog clock", 530: "digital clock", 423: "barber chair", 559: "folding chair", 765: "rocking chair, rocker",
    134: "crane", 517: "crane", 703: "park bench", 999: "toilet tissue, toilet paper, bathroom tissue",
}  # fmt: skip
CLOCK, CHAIR = (409, 530), (423, 559, 765)


def objectnet(folder, each=2, side=(30, 24)):
    """As objectnet-1.0.zip unpacks: three of the classes are ImageNet's, two are not."""
    (folder / "mappings").mkdir(parents=True)
    folders = {
        "alarm_clock": "Alarm clock", "bench": "Bench", "chair": "Chair", "banana_t_shirt": "T-shirt (banana)",
        "air_freshener": "Air freshener",
    }  # fmt: skip
    numbers = np.random.default_rng(0).permutation(1000)  # ImageNet's own, by output
    lines = [""] * 1000
    for output, number in enumerate(numbers.tolist()):
        lines[number] = OUTPUTS.get(output, f"name {output}, other name {output}")
    tables = {
        "folder_to_objectnet_label.json": folders,
        "objectnet_to_imagenet_1k.json": {
            "Alarm clock": "analog clock; digital clock",
            "Chair": "barber chair; folding chair; rocking chair, rocker",
            "Bench": "park bench",
        },
        "pytorch_to_imagenet_2012_id.json": {str(output): number for output, number in enumerate(numbers.tolist())},
    }
    for name, table in tables.items():
        (folder / "mappings" / name).write_text(json.dumps(table))
    (folder / "mappings/imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(1)
    for name in folders:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.full((side[1], side[0], 3), (255, 0, 0), np.uint8)
            pixels[2:-2, 2:-2] = rng.integers(0, 256, (side[1] - 4, side[0] - 4, 3))
            Image.fromarray(pixels).save(folder / f"images/{name}/{number:x}f{number}.png")
    (folder / "README").write_text("ObjectNet has no training set!")
    return folder


def test_objectnet_has_the_classes_that_imagenet_has_too_and_no_border(tmp_path):
    source = objectnet(tmp_path / "objectnet-1.0")
    assert find_kind(str(source)) == "objectnet"
    built = build(source, tmp_path / "out", shard_samples=4, workers=1)
    assert built.others == {"classes that ImageNet does not have": 2}
    dataset = Dataset.open(tmp_path / "out")
    assert len(dataset.classes) == 1000
    assert dataset.classes == sorted(set(dataset.classes))
    places = {0: "n01440764", 409: "n02708093", 530: "n03196217", 703: "n03891251", 999: "n15075141"}
    assert {place: dataset.classes[place] for place in places} == places  # as in ImageNet's synset list
    samples = {each.key: each for each in (dataset[place] for place in range(len(dataset)))}
    labels = {"alarm_clock": CLOCK, "chair": CHAIR, "bench": (703,)}
    assert {key: each.labels for key, each in samples.items()} == {
        f"{name}/{number}f{number}": labels[name] for name in labels for number in range(2)
    }
    for key, each in samples.items():
        assert each.image.startswith(b"\x89PNG")
        whole = np.asarray(Image.open(source / f"images/{key}.png"))
        assert np.array_equal(decode(each.image, key), whole[2:-2, 2:-2])
    assert build(source, tmp_path / "out", shard_samples=4, workers=1).parts == built.parts  # it was there


def test_objectnet_is_shrunk_after_its_border_is_cut(tmp_path):
    source = objectnet(tmp_path / "objectnet-1.0", each=1, side=(64, 44))
    build(source, tmp_path / "out", encoding=Encoding(resize_short=20, format="jpg", quality=95), workers=1)
    dataset = Dataset.open(tmp_path / "out")
    for place in range(len(dataset)):
        image = decode(dataset[place].image, "")
        assert image.shape == (20, 30, 3)
        assert dataset[place].image.startswith(b"\xff\xd8")
        assert image[0].astype(int).mean(0)[0] - image[0].astype(int).mean(0)[1] < 60  # not red


def test_objectnet_in_a_bucket(tmp_path, s3):
    source = objectnet(tmp_path / "objectnet-1.0")
    build(upload(source, f"{s3}/objectnet-1.0"), tmp_path / "out", workers=1)
    assert len(Dataset.open(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("folder_to_objectnet_label.json", None, r"lacks mappings/folder_to_.*; unpack objectnet-1.0.zip again"),
        ("imagenet_to_label_2012_v2", None, r"lacks mappings/imagenet_to_label_2012_v2; unpack"),
        ("pytorch_to_imagenet_2012_id.json", "<html>", r"pytorch_to_.*json is damaged, or another file; unpack"),
        ("folder_to_objectnet_label.json", "[]", r"folder_to_.*json is damaged, or another file; unpack"),
        ("folder_to_objectnet_label.json", '{"chair": "Stool"}', "the mappings of .* do not fit each other; unpack"),
        ("objectnet_to_imagenet_1k.json", '{"Chair": "barber chair; throne"}', "do not fit each other"),
        ("objectnet_to_imagenet_1k.json", '{"Chair": 3}', "do not fit each other"),
        ("pytorch_to_imagenet_2012_id.json", '{"0": 1000}', "do not fit each other"),
        ("pytorch_to_imagenet_2012_id.json", '{"0": "1"}', "do not fit each other"),
        ("imagenet_to_label_2012_v2", "barber chair\n", "do not fit each other"),
        ("folder_to_objectnet_label.json", '{"../images/chair": "Chair"}', "do not fit each other"),
        ("folder_to_objectnet_label.json", '{"stool": "Chair"}', "has no images in images/stool; unpack"),
    ],
)
def test_objectnet_whose_mappings_are_wrong(tmp_path, name, text, error):
    source = objectnet(tmp_path / "objectnet-1.0", each=1)
    path = source / "mappings" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=error) as raised:
        build(source, tmp_path / "out", kind="objectnet")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_objectnet_images_that_are_all_border_are_rejected(tmp_path):
    source = objectnet(tmp_path / "objectnet-1.0", each=1)
    Image.new("RGB", (4, 9)).save(source / "images/bench/tiny.png")
    with pytest.raises(UserError, match="4 x 9 pixels are nothing but a border of 2"):
        build(source, tmp_path / "out", workers=1)
    build(source, tmp_path / "out", workers=1, max_rejected=1)
    assert len(Dataset.open(tmp_path / "out")) == 3
