"""ImageNet's official tars, made small: train (tar of tars), validation with devkit and ReaL labels, and 21k."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from shards.build import build
from shards.errors import UserError
from shards.sources import imagenet
from shards.sources.open import open_source
from shards.sources.reader import Reader
from tests.shards.images import encode
from tests.shards.sources.servers import serve, upload

# In the devkit's own order, which is not the sorted one; the last two are inner nodes of WordNet.
SYNSETS = [("n02119789", 0), ("n02100735", 0), ("n01440764", 0), ("n00004475", 2), ("n00015388", 1)]
WNIDS = ["n01440764", "n02100735", "n02119789"]
EACH = 5


def tar_of(files: list[tuple[str, bytes]], mode: str = "w", format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def image(wnid: str, number: int) -> bytes:
    return encode(int(wnid[1:]) + number)


def class_tar(wnid: str) -> bytes:
    return tar_of([(f"{wnid}_{n * 37}.JPEG", image(wnid, n)) for n in range(EACH)])


def write_train(path: Path) -> Path:
    path.write_bytes(tar_of([(f"{wnid}.tar", class_tar(wnid)) for wnid, inner in SYNSETS if not inner]))
    return path


def write_val(path: Path, count: int = 6) -> Path:
    numbers = [3, 1, 2, *range(4, count + 1)]  # not in order
    path.write_bytes(tar_of([(f"ILSVRC2012_val_{n:08d}.JPEG", encode(n)) for n in numbers]))
    return path


def write_devkit(path: Path, truth: list[int]) -> Path:
    """Write meta.mat as the devkit has it, synsets of eight fields, and the ground truth in the devkit's numbers."""
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images"]  # fmt: skip
    synsets = np.zeros((len(SYNSETS), 1), dtype=[(name, object) for name in fields])
    for n, (wnid, inner) in enumerate(SYNSETS):
        synsets[n, 0] = (
            float(n + 1),
            wnid,
            f"words of {wnid}",
            "gloss",
            float(inner),
            np.zeros((1, inner)),
            0.0,
            1300.0,
        )
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets})
    folder = "ILSVRC2012_devkit_t12"
    files = [
        (f"{folder}/readme.txt", b"hello"),
        (f"{folder}/data/meta.mat", mat.getvalue()),
        (f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{n}\n" for n in truth).encode()),
    ]
    path.write_bytes(tar_of(files, "w:gz"))
    return path


TRUTH = [1, 2, 3, 3, 1, 2]  # of images 1 to 6
TRUE = [2, 1, 0, 0, 2, 1]  # the same as places among the sorted wnids


@pytest.fixture
def official(tmp_path):
    folder = tmp_path / "imagenet"
    folder.mkdir()
    write_train(folder / imagenet.TRAIN)
    write_val(folder / imagenet.VAL)
    write_devkit(folder / imagenet.DEVKIT, TRUTH)
    (folder / "real.json").write_text(json.dumps([[2], [], [0, 1], [0], [2, 0], []]))
    return folder


def read(source, tmp_path):
    return list(Reader(source.root, tmp_path / "u").read_all(source.items()))


@pytest.fixture(params=["disk", "s3", "web"])
def place(request, official):
    """The folder of the official files: a path, a bucket, a web folder."""
    if request.param == "disk":
        yield str(official)
    elif request.param == "s3":
        yield upload(official, f"{request.getfixturevalue('s3')}/data sets/imagenet")
    else:
        with serve(official) as web:
            yield web


def test_train(place, tmp_path):
    source = open_source(f"{place}/{imagenet.TRAIN}", unpacked=tmp_path / "u")
    assert source.kind == "imagenet"
    assert source.classes == WNIDS
    got = read(source, tmp_path)
    expected = [(wnid, n) for wnid, inner in SYNSETS if not inner for n in range(EACH)]
    assert [item.key for item, _ in got] == [f"{wnid}/{wnid}_{n * 37}" for wnid, n in expected]
    assert [source.classes[item.labels[0]] for item, _ in got] == [wnid for wnid, _ in expected]
    assert [data for _, data in got] == [image(wnid, n) for wnid, n in expected]
    assert {item.file for item, _ in got} == {imagenet.TRAIN}  # in place
    assert not (tmp_path / "u").exists()


def test_validation(place, tmp_path):
    source = open_source(f"{place}/{imagenet.VAL}", unpacked=tmp_path / "u")
    assert source.kind == "imagenet"
    assert source.classes == WNIDS
    assert not source.multi_label
    got = read(source, tmp_path)
    assert [item.key for item, _ in got][:3] == [f"ILSVRC2012_val_{n:08d}" for n in (3, 1, 2)]
    for item, data in got:
        number = int(item.key[-8:])
        assert item.labels == (TRUE[number - 1],)
        assert data == encode(number)


def test_real_labels(place, tmp_path):
    source = open_source(f"{place}/{imagenet.VAL}", unpacked=tmp_path / "u", real=f"{place}/real.json")
    assert source.multi_label
    labels = {int(item.key[-8:]): item.labels for item in source.items()}
    assert labels == {1: (2,), 2: (), 3: (0, 1), 4: (0,), 5: (2, 0), 6: ()}


def test_real_labels_are_of_validation_images_alone(official, tmp_path):
    """Else the training images, in the same build, would count as labelled by ReaL too."""
    said = r"imagenet has training images too, which have no ReaL labels; give .*imagenet/ILSVRC2012_img_val.tar alone"
    with pytest.raises(UserError, match=said):
        build(official, tmp_path / "out", options={"real": str(official / "real.json")}, split={"dev": 0.3})
    assert not (tmp_path / "out").exists()
    (official / imagenet.TRAIN).unlink()
    assert open_source(official, unpacked=tmp_path, real=str(official / "real.json")).parts == ["val"]


def test_both_in_a_folder_are_two_parts(official, s3, tmp_path):
    (official / "ILSVRC2012_img_test_v10102019.tar").write_bytes(b"not looked at")
    for url in (official, upload(official, s3)):
        source = open_source(url, unpacked=tmp_path / "u")
        assert source.kind == "imagenet"
        parts = [item.part for item in source.items()]
        assert parts == ["train"] * 3 * EACH + ["val"] * 6


def test_a_part_without_images_is_told(official, tmp_path):
    (official / imagenet.VAL).write_bytes(tar_of([("readme.txt", b"x")]))
    with pytest.raises(UserError, match=r"imagenet has no images in its part val; get it again"):
        build(official, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["fall11_whole.tar", "winter21_whole.tar.gz", "folder"])
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_21k(name, where, request, tmp_path):
    inner = [(f"winter21_whole/{wnid}.tar", class_tar(wnid)) for wnid in WNIDS[::-1]]
    inner.append(("winter21_whole/n99999999.tar", tar_of([])))
    folder = tmp_path / "21k"
    folder.mkdir()
    if name == "folder":
        for file, data in inner:
            (folder / Path(file).name).write_bytes(data)
    else:
        (folder / name).write_bytes(tar_of(inner, "w:gz" if name.endswith("gz") else "w"))
    base = str(folder) if where == "disk" else upload(folder, request.getfixturevalue("s3"))
    source = open_source(base if name == "folder" else f"{base}/{name}", unpacked=tmp_path / "u")
    assert source.kind == "imagenet"
    assert source.classes == [*WNIDS, "n99999999"]
    got = read(source, tmp_path)
    assert {item.key: (source.classes[item.labels[0]], data) for item, data in got} == {
        f"{wnid}/{wnid}_{n * 37}": (wnid, image(wnid, n)) for wnid in WNIDS for n in range(EACH)
    }
    assert source.others == {"class tars without images": 1}
    assert (tmp_path / "u").exists() == name.endswith("gz")


def test_odd_members_touch_nothing(tmp_path):
    odd = [("../../../up.JPEG", encode(1)), ("/abs/x.y.JPEG", encode(2)), ("n01440764/in.JPEG", encode(3)),
           ("ü b.JPEG", encode(4)), ("notes.txt", b"x"), ("n" * 150 + ".JPEG", encode(5))]  # fmt: skip
    path = tmp_path / "x.tar"
    path.write_bytes(tar_of([("deep/n01440764.tar", tar_of(odd, format=tarfile.PAX_FORMAT)), ("readme.md", b"x")]))
    source = open_source(path, unpacked=tmp_path / "u")
    got = {item.key: data for item, data in read(source, tmp_path)}
    assert got == {
        "n01440764/__/__/__/up": encode(1), "n01440764/abs/x_y": encode(2), "n01440764/in": encode(3),
        "n01440764/ü b": encode(4), "n01440764/" + "n" * 150: encode(5),
    }  # fmt: skip
    assert source.others == {".md": 1, ".txt": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["x.tar"]


def test_what_is_missing_or_damaged(official, tmp_path):
    val, devkit = official / imagenet.VAL, official / imagenet.DEVKIT
    elsewhere = devkit.rename(tmp_path / "kit.tgz")
    with pytest.raises(UserError, match=r"no .*devkit.*; put it beside"):
        open_source(val, unpacked=tmp_path)
    assert len(list(open_source(val, unpacked=tmp_path, devkit=str(elsewhere)).items())) == 6
    write_devkit(devkit, TRUTH[:4])
    with pytest.raises(UserError, match=r"'ILSVRC2012_val_00000005', for which there is no label among 4"):
        list(open_source(val, unpacked=tmp_path).items())
    write_devkit(devkit, [9])
    with pytest.raises(UserError, match=r"devkit .* damaged or another one"):
        open_source(val, unpacked=tmp_path)
    devkit.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"devkit .* damaged or another one"):
        open_source(val, unpacked=tmp_path)
    write_devkit(devkit, TRUTH)
    for text in ("[[0], [5]]", "{}", "[[true]]", "<html>"):
        (official / "real.json").write_text(text)
        with pytest.raises(UserError, match="no list of lists of class indices below 3"):
            open_source(val, unpacked=tmp_path, real=str(official / "real.json"))
    for real in ([[0]] * 5, [[0]] * 7):
        (official / "real.json").write_text(json.dumps(real))
        with pytest.raises(
            UserError, match=rf"real.json are of {len(real)} images, and the devkit's of 6; get real.json"
        ):
            open_source(val, unpacked=tmp_path, real=str(official / "real.json"))
    with pytest.raises(UserError, match="no validation images"):
        open_source(official / imagenet.TRAIN, unpacked=tmp_path, real=str(official / "real.json"))
    train = official / imagenet.TRAIN
    data = train.read_bytes()
    train.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"img_train\.tar is cut short at byte"):
        open_source(train, unpacked=tmp_path)
    broken = tar_of([("n01440764.tar", class_tar("n01440764")[:2000])])
    train.write_bytes(broken)
    with pytest.raises(UserError, match=r"img_train\.tar.* is cut short"):
        list(open_source(train, unpacked=tmp_path).items())
    packed = tmp_path / "winter21_whole.tar.gz"
    packed.write_bytes(tar_of([("n01440764.tar", class_tar("n01440764"))], "w:gz")[:-20])
    with pytest.raises(UserError, match="is damaged"):
        open_source(packed, "imagenet", unpacked=tmp_path / "u")
    assert not list((tmp_path / "u").glob("*.bin"))
