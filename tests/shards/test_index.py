"""Indexing tars of others: what it finds, says, keeps and refuses."""

import hashlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from xxhash import xxh3_128_digest

from launch.cli import app
from shards import manifest
from shards.dataset import Dataset
from shards.errors import UserError
from shards.index import index
from shards.store import open_store
from tests.shards.foreign import image, samples, write_img2dataset, write_tar, write_webdataset
from tests.shards.images import tree


def stock(*paths):
    """Return all samples as stock webdataset reads them."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found = []
    for path in paths:
        with open(path, "rb") as stream:
            found += list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return found


def test_a_set_of_stock_webdataset(tmp_path):
    folder = write_webdataset(tmp_path / "set")
    before = tree(folder)
    made = index(folder)
    assert {path: data for path, data in tree(folder).items() if path in before} == before  # tars are left alone
    dataset = Dataset.open(folder)
    theirs = stock(*sorted(folder.glob("*.tar")))
    ours = [dataset[i] for i in range(len(dataset))]
    assert [(s.key, s.image, s.labels, s.format) for s in ours] == [
        (s["__key__"], s["jpg"], (int(s["cls"]),), "jpg") for s in theirs
    ]
    assert dataset.classes == ["0", "1", "2"]
    assert dataset.shard_sizes.tolist() == [10, 10, 4]
    assert (made.samples, made.shards, made.read, made.unlabelled, made.rejected) == (24, 3, 3, 0, [])
    shards = manifest.read_table((folder / manifest.SHARDS).read_bytes()).to_pylist()
    for row in shards:
        tar = (folder / row["path"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(tar), hashlib.sha256(tar).hexdigest())
    table = manifest.read_table((folder / manifest.samples_path(1)).read_bytes()).to_pylist()
    for row, sample in zip(table, ours[10:20], strict=True):
        assert row["xxh128"] == xxh3_128_digest(sample.image)
        with Image.open(io.BytesIO(sample.image)) as opened:
            assert (row["width"], row["height"]) == opened.size


def test_the_layout_of_img2dataset_has_captions_and_no_labels(tmp_path):
    folder = write_img2dataset(tmp_path / "set")
    made = index(folder, tmp_path / "out")
    assert (made.samples, made.shards, made.unlabelled, made.classes) == (12, 3, 12, [])
    assert [(s.key, s.image, s.labels) for s in samples(tmp_path / "out")] == [
        (s["__key__"], s["jpg"], ()) for s in stock(*sorted(folder.glob("*.tar")))
    ]
    assert not (folder / "manifest").exists()


def test_the_manifest_moves_with_its_tars_and_finds_them_elsewhere(tmp_path, monkeypatch):
    write_webdataset(tmp_path / "set")
    index(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    index("set", "out")
    shutil.move(tmp_path / "set", tmp_path / "moved")
    assert len(samples(tmp_path / "moved")) == 24
    shutil.move(tmp_path / "moved", tmp_path / "set")
    monkeypatch.chdir("/")
    assert samples(tmp_path / "out") == samples(tmp_path / "set")
    assert Dataset.open(tmp_path / "out").digest == Dataset.open(tmp_path / "set").digest


LONG = "d" * 90 + "/" + "k" * 140


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_all_kinds(tmp_path, format):
    names = [
        "a/x", "b/x", "./c/Ünïcødé 日本", LONG, "../../up", "/root/y", "v1.2/z",
    ]  # fmt: skip
    members = []
    for i, name in enumerate(names):
        extension = ["jpg", "JPEG", "png", "webp"][i % 4]
        members += [
            (f"{name}.{extension}", image(i, extension.lower())),
            (f"{name}.seg.png", image(50 + i, "png")),
            (f"{name}.cls", str(i).encode()),
        ]
    write_tar(tmp_path / "t.tar", members, format)
    made = index(tmp_path)
    found = samples(tmp_path)
    assert [(s.key, s.image, s.labels) for s in found] == [
        (name, members[3 * i][1], (i,)) for i, name in enumerate(names)
    ]
    assert [s.format for s in found] == ["jpg", "jpg", "png", "webp"] * 1 + ["jpg", "jpg", "png"]
    assert not made.rejected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest", "t.tar"]


def test_broken_samples_are_listed_with_reasons(tmp_path):
    whole = image(0)
    write_tar(
        tmp_path / "t.tar",
        [
            ("ok.jpg", whole), ("ok.cls", b"0"),
            ("empty.jpg", b""),
            ("cut.jpg", whole[:-30]),
            ("text.jpg", b"<html>404 not found</html>"),
            ("only.cls", b"1"),
            ("two.jpg", whole), ("two.png", image(1, "png")),
            ("twice.jpg", whole), ("twice.JPG", whole),
            ("lie.png", whole), ("lie.cls", b"0"),
        ],
    )  # fmt: skip
    made = index(tmp_path, max_rejected=6)
    assert dict(made.rejected) == {
        "t.tar empty": "empty file",
        "t.tar cut": "cut short: no end marker",
        "t.tar text": "not a jpg, png or webp image",
        "t.tar only": "no image, only .cls",
        "t.tar two": "several images, .jpg .png: choose with --image",
        "t.tar twice": "the key is there twice, .jpg .jpg: rename one, or remove it",
    }
    assert [(s.key, s.format) for s in samples(tmp_path)] == [("ok", "jpg"), ("lie", "jpg")]  # the true format
    assert manifest.read_receipt(open_store(tmp_path), manifest.samples_path(0)).rejected[0] == ("empty", "empty file")
    with pytest.raises(UserError, match=r"6 broken samples .* 5 allowed"):
        index(tmp_path, max_rejected=5)


@pytest.mark.parametrize("order", [("jpg", "cls"), ("cls", "jpg")])
def test_files_of_a_sample_that_do_not_lie_together_are_told(tmp_path, order):
    data = {"jpg": image, "cls": lambda i: b"1"}
    write_tar(tmp_path / "t.tar", [(f"{i}.{e}", data[e](i)) for e in order for i in range(3)] + [("x.cls", b"0")])
    with pytest.raises(UserError, match=r"t\.tar 0 \(no image, only \.cls: its files do not lie together, .*sorted by"):
        index(tmp_path)
    made = index(tmp_path, max_rejected=4)
    assert [("together" in reason) for _, reason in made.rejected if reason.startswith("no image")].count(True) == 3


def test_nothing_is_left_out_where_nothing_would_be_left(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"{i}.{e}", image(i)) for i in range(3) for e in ("a.jpg", "b.jpg")])
    with pytest.raises(UserError, match=r"choose with --image.*not one is whole: look what the tars hold") as caught:
        index(tmp_path)
    assert "--max-rejected" not in str(caught.value)


def test_one_of_several_images_is_chosen(tmp_path):
    both = [("a.input.jpg", image(0)), ("a.target.jpg", image(1)), ("a.cls", b"0")]
    write_tar(tmp_path / "t.tar", both)
    with pytest.raises(UserError, match=r"several images, \.input\.jpg \.target\.jpg: choose with --image"):
        index(tmp_path)
    index(tmp_path, image=".target.JPG")
    assert samples(tmp_path)[0].image == image(1)


def test_orientation_is_in_the_table(tmp_path):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(file, "JPEG", exif=exif)
    write_tar(tmp_path / "t.tar", [("a.jpg", file.getvalue()), ("b.jpg", image(0))])
    index(tmp_path)
    table = manifest.read_table((tmp_path / manifest.samples_path(0)).read_bytes())
    assert table["orientation"].to_pylist() == [6, 1]
    assert (table["width"][0].as_py(), table["height"][0].as_py()) == (8, 4)


def test_what_lies_behind_the_end_and_beside_samples_is_told(tmp_path):
    path = write_tar(tmp_path / "t.tar", [("a.jpg", image(0))])
    path.write_bytes(path.read_bytes() * 2)
    with tarfile.open(tmp_path / "u.tar", "w") as tar:
        info = tarfile.TarInfo("b.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    made = index(tmp_path)
    assert made.trailing == {"t.tar": path.stat().st_size // 2}
    assert made.skipped == {"links": 1}
    assert Dataset.open(tmp_path).shard_sizes.tolist() == [1, 0]


def test_other_things_are_left_alone(tmp_path):
    folder = write_webdataset(tmp_path / "set", samples=20)
    with pytest.raises(UserError, match=r"no file in .*none, 1 tar; check"):
        index(write_tar(tmp_path / "none" / "t.tar", []).parent)
    with pytest.raises(UserError, match=r"only 1 files without extension in .*odd, 1 tar; check"):
        index(write_tar(tmp_path / "odd" / "t.tar", [("README", b"")]).parent)
    with pytest.raises(
        UserError, match=r"no sample with a whole image in .*bad: t\.tar a \(empty file\), \.\.\.; check"
    ):
        index(write_tar(tmp_path / "bad" / "t.tar", [("a.jpg", b"")]).parent, max_rejected=1)
    index(str(folder / "set-00000{0..0}.tar"))
    with pytest.raises(UserError, match=r"holds the index of other tars \(set-000000\.tar"):
        index(str(folder / "set-*1.tar"))
    info = json.loads((folder / manifest.DATASET).read_text())
    info["build"] = {"source": "folder"}
    (folder / manifest.DATASET).write_text(json.dumps(info))
    with pytest.raises(UserError, match="was built here and needs no index"):
        index(folder)
    for kwargs in ({"workers": 0}, {"max_rejected": -1}):
        with pytest.raises(UserError, match="must be at least"):
            index(folder, **kwargs)


def test_splits_side_by_side_are_not_mixed(tmp_path):
    for name in ("set-train-0.tar", "set-train-1.tar", "set-validation-0.tar"):
        write_tar(tmp_path / name, [(f"{name[:-4]}.jpg", image(0))])
    splits = {
        split: {"name": split, "filenames": [f"set-{split}-0.tar"], "shard_lengths": [1], "num_samples": 1}
        for split in ("train", "validation")
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(UserError, match=r"several splits: train \(set-train-0\.tar, \.\.\.\), validation"):
        index(tmp_path)
    assert index(f"{tmp_path}/set-train-*.tar", tmp_path / "train").samples == 2


def test_rows_hold_little(tmp_path):
    write_webdataset(tmp_path, samples=5)
    index(tmp_path)
    rows = Dataset.open(tmp_path).rows(0)
    assert rows.weights is None
    assert rows.member.dtype == np.uint32


def test_the_command_says_what_it_found(tmp_path):
    runner = CliRunner()
    write_img2dataset(tmp_path / "captions")
    done = runner.invoke(app, ["shards", "index", str(tmp_path / "captions")])
    assert done.exit_code == 0
    assert "12 samples in 3 shards, " in done.stdout
    assert "no sample has a label: captions" in done.stdout
    write_tar(tmp_path / "set" / "0.tar", [("a.jpg", image(0)), ("a.cls", b"3"), ("b.jpg", image(1)), ("c.jpg", b"")])
    command = ["shards", "index", str(tmp_path / "set"), "--max-rejected", "1"]
    done = runner.invoke(app, command)
    assert "4 classes, 1 sample without label" in done.stdout
    assert "left out: 0.tar c: empty file" in done.stdout
    done = runner.invoke(app, [*command, "--json"])
    made = json.loads(done.stdout)
    assert (made["read"], made["samples"], made["rejected"]) == (0, 2, [["0.tar c", "empty file"]])
