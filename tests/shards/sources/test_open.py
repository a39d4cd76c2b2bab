"""Finding out what a source is, where more than one answer is possible; and a build of each through to the end."""

import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from shards.sources.open import KINDS, find_kind, open_source
from shards.store import open_store
from tests.shards.images import encode, make_source, tree
from tests.shards.sources import test_cifar, test_imagenet, test_parquet, test_tars
from tests.shards.sources.servers import upload


def test_two_kinds_in_one_folder_must_be_told(tmp_path):
    make_source(tmp_path / "x", classes=2, each=2)
    test_tars.write(tmp_path / "x/more.tar", [("a.jpg", encode(0)), ("a.cls", b"0")])
    with pytest.raises(UserError, match=r"could be folder or tars; say which of the kinds"):
        open_source(tmp_path / "x", unpacked=tmp_path / "u")
    assert open_source(tmp_path / "x", "tars", unpacked=tmp_path / "u").kind == "tars"
    assert open_source(tmp_path / "x", "folder", unpacked=tmp_path / "u").others == {".tar": 1}


def test_parquet_of_paths_is_a_table_and_of_bytes_is_not(tmp_path):
    pq.write_table(pa.table({"path": ["a.jpg"], "label": [0]}), tmp_path / "paths.parquet")
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "bytes.parquet")
    assert find_kind(str(tmp_path / "paths.parquet")) == "table"
    assert find_kind(str(tmp_path / "bytes.parquet")) == "parquet"


def test_class_folders_with_names_of_cifar_are_images(tmp_path):
    for name in ("train", "test", "meta"):
        (tmp_path / "x" / name).mkdir(parents=True)
        (tmp_path / "x" / name / "a.jpg").write_bytes(encode(0))
    assert find_kind(str(tmp_path / "x")) == "folder"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.jsonl", "parquet"),
        ("x.csv", "folder"),
        ("x.parquet", "cifar"),
        ("x.jsonl", "imagenet"),
        ("x.tar.gz", "tars"),
    ],
)
def test_a_file_that_the_given_kind_does_not_take(tmp_path, name, kind):
    path = tmp_path / name
    path.touch()
    with pytest.raises(UserError, match=rf"source .*{name} is a file, .* kind {kind} .*; leave --kind away") as caught:
        open_source(path, kind, unpacked=tmp_path / "u")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tar"])
def test_unknown_and_damaged_archives(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(UserError, match=r"x\.tar.* is no tar") as caught:
        open_source(path, unpacked=tmp_path / "u")
    assert "\n" not in str(caught.value)
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a.jpg")
        tar.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match=r"compressed .*; unpack it to a plain \.?tar first"):
        open_source(path, unpacked=tmp_path / "u")


def make(kind, folder):
    """Make a small source of a kind; return it with the number of images in each part."""
    folder.mkdir()
    if kind == "folder":
        return make_source(folder / "x", classes=2, each=4), {"all": 8}
    if kind == "table":
        make_source(folder / "x", classes=2, each=1)
        rows = [{"path": f"x/class.{n}/im.0.jpg", "label": ["a", "b"][: n + 1]} for n in range(2)]
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
        return folder / "t.parquet", {"all": 2}
    if kind == "parquet":
        test_parquet.write(folder / "train-00000-of-00001.parquet", [0, 1, 2])
        test_parquet.write(folder / "test-00000-of-00001.parquet", [2], 9)
        return folder, {"train": 3, "test": 1}
    if kind == "cifar":
        path = test_cifar.archive(folder / "cifar-100-python.tar.gz", "cifar-100-python")
        return path, {"train": test_cifar.EACH, "test": test_cifar.EACH}
    if kind == "imagenet":
        test_imagenet.write_train(folder / "ILSVRC2012_img_train.tar")
        test_imagenet.write_val(folder / "ILSVRC2012_img_val.tar")
        test_imagenet.write_devkit(folder / "ILSVRC2012_devkit_t12.tar.gz", test_imagenet.TRUTH)
        return folder, {"train": 15, "val": 6}
    return test_tars.write(folder / "x.tar", [("a b.jpg", encode(0)), ("a b.cls", b"1")]).parent, {"all": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_built_to_the_end(kind, tmp_path):
    source, parts = make(kind, tmp_path / "source")
    trees = []
    for workers in (1, 2 if kind == "parquet" else 1):  # two, so that readers travel to processes
        out = tmp_path / f"out{workers}"
        result = build(source, out, workers=workers, shard_samples=2 if kind != "cifar" else 5)
        assert {name: part.samples for name, part in result.parts.items()} == parts
        assert all(len(Dataset.open(part.url)) == part.samples for part in result.parts.values())
        trees.append(tree(out))
    assert trees[0] == trees[1]
    assert not [name for name in trees[0] if name.endswith((".bin", ".lock", ".partial"))]  # what was unpacked is gone


def test_from_a_bucket_into_a_bucket(s3, tmp_path):
    test_imagenet.write_train(tmp_path / "x.tar")
    build(tmp_path / "x.tar", tmp_path / "out", workers=1, shard_samples=4)
    upload(tmp_path, f"{s3}/in")
    build(f"{s3}/in/x.tar", f"{s3}/out", workers=2, shard_samples=4)
    local, remote = Dataset.open(tmp_path / "out"), Dataset.open(f"{s3}/out")
    assert [local[n].key for n in range(15)] == [remote[n].key for n in range(15)]
    assert (
        open_store(f"{s3}/out").read("manifest/dataset.json") == (tmp_path / "out/manifest/dataset.json").read_bytes()
    )
