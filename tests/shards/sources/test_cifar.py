"""CIFAR in all its forms, in the layout of the official archives, and pickles that mean harm."""

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.errors import UserError
from shards.sources.open import open_source
from shards.sources.reader import Reader
from tests.shards.sources.servers import serve, upload

EACH = 7
TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = [f"fine_{number}" for number in range(100)]


class Python2:
    """Writes pickles of protocol 2 as Python 2 did, where text and bytes are one type: what the archives hold."""

    def __init__(self):
        self.out = bytearray(b"\x80\x02")

    def put(self, value):
        if isinstance(value, dict):
            self.out += b"}("
            for name, each in value.items():
                self.put(name)
                self.put(each)
            self.out += b"u"
        elif isinstance(value, list):
            self.out += b"]("
            for each in value:
                self.put(each)
            self.out += b"e"
        elif isinstance(value, tuple):
            self.out += b"("
            for each in value:
                self.put(each)
            self.out += b"t"
        elif value is None:
            self.out += b"N"
        elif isinstance(value, bool):
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self.out += b"J" + struct.pack("<i", value)
        elif isinstance(value, (bytes, str)):
            data = value.encode() if isinstance(value, str) else value
            self.out += b"T" + struct.pack("<i", len(data)) + data
        else:
            self.array(value)
        return self

    def array(self, value):
        self.out += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
        self.put((0,))
        self.put("b")
        self.out += b"tR("
        self.put(1)
        self.put(value.shape)
        self.out += b"cnumpy\ndtype\n"
        self.put(("u1", 0, 1))
        self.out += b"R"
        self.put((3, "|", None, None, None, -1, -1, 0))
        self.out += b"b"
        self.put(value.flags.f_contiguous and not value.flags.c_contiguous)
        self.put(value.tobytes("A"))
        self.out += b"tb"

    def dump(self, value):
        self.put(value)
        return bytes(self.out + b".")


def batch(seed, classes):
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, EACH).tolist(), rng.integers(0, 256, (EACH, 3072), dtype=np.uint8)


def ten():
    """Return labels and pixels of each file, as in CIFAR-10."""
    return {f"data_batch_{n}": batch(n, 10) for n in range(1, 6)} | {"test_batch": batch(9, 10)}


def hundred():
    return {"train": batch(1, 100), "test": batch(2, 100)}


def files(form):
    """Return the name of the folder in the archive, and the files in it."""
    if form == "cifar-10-python":
        content = {
            name: Python2().dump({"batch_label": name, "labels": labels, "data": np.asfortranarray(pixels) if n == 1
                                  else pixels, "filenames": ["x.png"] * EACH})
            for n, (name, (labels, pixels)) in enumerate(ten().items())
        }  # fmt: skip
        return "cifar-10-batches-py", content | {
            "batches.meta": Python2().dump({"num_cases_per_batch": EACH, "label_names": TEN, "num_vis": 3072}),
            "readme.html": b"<html>",
        }
    if form == "cifar-10-binary":
        content = {
            f"{name}.bin": b"".join(bytes([label]) + image.tobytes() for label, image in zip(*both, strict=True))
            for name, both in ten().items()
        }
        return "cifar-10-batches-bin", content | {"batches.meta.txt": ("\n".join(TEN) + "\n\n").encode()}
    if form == "cifar-100-python":
        content = {
            name: Python2().dump({"fine_labels": labels, "coarse_labels": [0] * EACH, "data": pixels})
            for name, (labels, pixels) in hundred().items()
        }
        return form, content | {
            "meta": Python2().dump({"fine_label_names": HUNDRED, "coarse_label_names": ["c"] * 20}),
            "file.txt~": b"",
        }
    content = {
        f"{name}.bin": b"".join(bytes([19, label]) + image.tobytes() for label, image in zip(*both, strict=True))
        for name, both in hundred().items()
    }
    return form, content | {
        "fine_label_names.txt": ("\n".join(HUNDRED) + "\n").encode(),
        "coarse_label_names.txt": b"c\n" * 20,
    }


def archive(path: Path, form: str, change=None) -> Path:
    """Write the official archive of a form, its files in no special order."""
    folder, content = files(form)
    content |= change or {}
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(folder)
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        for name, data in sorted(content.items(), key=lambda entry: entry[1]):
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


FORMS = ["cifar-10-python", "cifar-10-binary", "cifar-100-python", "cifar-100-binary"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["archive", "folder", "folder around", "s3", "web"])
def test_all_forms(form, where, tmp_path, request):
    url = archive(tmp_path / f"{form}.tar.gz", form)
    if "folder" in where:
        folder, content = files(form)
        url = tmp_path / "x" / folder
        url.mkdir(parents=True)
        for name, data in content.items():
            (url / name).write_bytes(data)
        url = tmp_path / "x" if where == "folder around" else url
    elif where == "s3":
        url = upload(tmp_path, request.getfixturevalue("s3")) + f"/{form}.tar.gz"
    with serve(tmp_path) as web:
        if where == "web":
            url = f"{web}/{form}.tar.gz"
        source = open_source(url, unpacked=tmp_path / "u")
    assert source.kind == "cifar"
    assert source.classes == (TEN if "10-" in form else HUNDRED)
    got = list(Reader(source.root, tmp_path / "u").read_all(source.items()))
    expected = ten() if "10-" in form else hundred()
    labels = [label for labels, _ in expected.values() for label in labels]
    pixels = np.concatenate([pixels for _, pixels in expected.values()])
    assert [item.labels for item, _ in got] == [(label,) for label in labels]
    images = np.stack([np.asarray(Image.open(io.BytesIO(data), formats=["PNG"])) for _, data in got])
    assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(-1, 3072), pixels)
    train = len(labels) - EACH
    assert [item.part for item, _ in got] == ["train"] * train + ["test"] * EACH
    assert [got[n][0].key for n in (0, 1, train)] == ["train/00000", "train/00001", "test/00000"]
    assert "__" not in got[0][0].file


def test_python_and_binary_form_give_the_same(tmp_path):
    for kind in ("10", "100"):
        lists = []
        for form in (f"cifar-{kind}-python", f"cifar-{kind}-binary"):
            source = open_source(archive(tmp_path / f"{form}.tar.gz", form), unpacked=tmp_path / form)
            got = list(Reader(source.root, tmp_path / form).read_all(source.items()))
            lists.append([(item.key, item.labels, item.part, data) for item, data in got])
        assert lists[0] == lists[1]


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_again_by_todays_numpy(tmp_path, protocol):
    content = {
        name: pickle.dumps({"labels": labels, "data": np.asfortranarray(pixels) if name == "test_batch" else pixels},
                           protocol)
        for name, (labels, pixels) in ten().items()
    }  # fmt: skip
    path = archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-python", content)
    source = open_source(path, unpacked=tmp_path / "u")
    got = list(Reader(source.root, tmp_path / "u").read_all(source.items()))
    images = np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, data in got])
    pixels = np.concatenate([pixels for _, pixels in ten().values()])
    assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(-1, 3072), pixels)


class Harm:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("victim", ["batches.meta", "data_batch_3"])
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_means_harm_is_refused(tmp_path, victim, protocol):
    mark = tmp_path / "mark"
    for call, name in [
        ((os.system, (f"touch {mark}",)), "system"),
        ((eval, (f"open({str(mark)!r}, 'w')",)), "eval"),
        ((np.fromfile, (str(mark),)), "fromfile"),
    ]:
        evil = pickle.dumps({"data": Harm(call), "labels": [], "label_names": []}, protocol)
        path = archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-python", {victim: evil})
        with pytest.raises(UserError, match=rf"{victim} wants to load .*{name}, which CIFAR has no need of"):
            open_source(path, unpacked=tmp_path / "u")
        assert not mark.exists()
        assert not list((tmp_path / "u").glob("*.bin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_2": b"\x80\x02}"}, "data_batch_2 is damaged"),
        ({"data_batch_2": Python2().dump({"labels": [1]})}, "data_batch_2 is damaged .*'data'"),
        ({"data_batch_2": Python2().dump({"labels": [1], "data": "text"})}, "its images cannot be read"),
        (
            {"data_batch_2": Python2().dump({"labels": [1], "data": np.zeros((1, 9), np.uint8)})},
            r"u1 \(1, 9\) where uint8",
        ),
        ({"data_batch_2": Python2().dump({"labels": [1, 2], "data": np.zeros((1, 3072), np.uint8)})}, "do not fit"),
        ({"data_batch_2": Python2().dump({"labels": [10], "data": np.zeros((1, 3072), np.uint8)})}, "do not fit"),
        ({"batches.meta": Python2().dump([1])}, "batches.meta is damaged"),
    ],
)
def test_damaged_python_form(tmp_path, change, message):
    path = archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-python", change)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path, unpacked=tmp_path / "u")
    assert "\n" not in str(caught.value)


def test_damaged_archives(tmp_path):
    path = archive(tmp_path / "cifar-10-binary.tar.gz", "cifar-10-binary", {"test_batch.bin": b"123"})
    with pytest.raises(UserError, match="3 bytes are no whole number"):
        open_source(path, unpacked=tmp_path / "u")
    archive(path, "cifar-10-binary")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match="is damaged"):
        open_source(path, "cifar", unpacked=tmp_path / "u")
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cifar-10-batches-bin/batches.meta.txt"))
    with pytest.raises(UserError, match=r"lacks data_batch_1\.bin, "):
        open_source(path, unpacked=tmp_path / "u")
    assert not list((tmp_path / "u").glob("*.bin"))
