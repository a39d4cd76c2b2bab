"""Indexing tars of others: what it finds, says, keeps and refuses."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner
from xxhash import xxh3_128_digest

from launch.cli import app
from shards import manifest
from shards.dataset import Dataset, write_exclude
from shards.errors import UserError
from shards.index import index
from shards.store import open_store
from shards.tarlist import find_tars
from tests.shards.foreign import image, write_img2dataset, write_tar, write_webdataset
from tests.shards.images import tree
from tests.shards.test_store import RangeHandler


def stock(*paths):
    """Return all samples as stock webdataset reads them."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    found = []
    for path in paths:
        with open(path, "rb") as stream:
            found += list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return found


def samples(url, **kwargs):
    dataset = Dataset.open(url, **kwargs)
    return [dataset[i] for i in range(len(dataset))]


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


LABELS = {
    "number": ("", {"cls": "2\n"}, [2]),
    "name": ("", {"cls": "cat"}, ["cat"]),
    "none": ("", {"cls": ""}, []),
    "skipped": ("", {"cls": "-1"}, []),
    "text of a list": ("", {"cls": "[1, 2]"}, [1, 2]),
    "json number": ("", {"json": 1}, [1]),
    "json list": ("", {"json": [2, 0]}, [2, 0]),
    "label": ("", {"json": {"label": 1, "cls": 2}}, [1]),
    "labels": ("", {"json": {"labels": [0, 2], "x": 1}}, [0, 2]),
    "cls in json": ("", {"json": {"cls": "dog"}}, ["dog"]),
    "names": ("", {"json": {"labels": ["dog", "cat"]}}, ["dog", "cat"]),
    "null": ("", {"json": {"label": None}}, []),
    "cls first": ("", {"cls": "1", "json": {"label": 2}}, [1]),
    "json where cls is empty": ("", {"cls": "", "json": {"label": 2}}, [2]),
    "caption": ("", {"txt": "2", "json": {"caption": "a cat"}}, []),
    "text asked for": ("txt", {"txt": " a cat ", "cls": "1"}, ["a cat"]),
    "field": ("json:meta.class", {"json": {"meta": {"class": 2}, "label": 1}}, [2]),
    "field with a dot": ("json:a.b", {"json": {"a.b": 1}}, [1]),
    "field is missing": ("json:other", {"json": {"label": 1}, "cls": "1"}, []),
    "other member": (".meta.json:y", {"meta.json": {"y": 2}, "json": {"label": 1}}, [2]),
}


@pytest.mark.parametrize(("rule", "members", "expected"), LABELS.values(), ids=LABELS)
def test_label_rules(tmp_path, rule, members, expected):
    beside = [(f"a.{e}", (v if isinstance(v, str) else json.dumps(v)).encode()) for e, v in members.items()]
    write_tar(tmp_path / "t.tar", [("a.jpg", image(0)), *beside])
    made = index(tmp_path, label=rule)
    dataset = Dataset.open(tmp_path)
    names = [dataset.classes[label] for label in dataset[0].labels]
    assert names == [str(label) for label in expected]
    assert made.unlabelled == (not expected)
    if all(isinstance(label, int) for label in expected):
        assert list(dataset[0].labels) == expected


BAD_LABELS = {
    "broken json": ("", {"json": b"{"}, ".json cannot be read"),
    "no text": ("", {"cls": b"\xff\xfe"}, ".cls cannot be read"),
    "fraction": ("", {"json": b"1.5"}, "'1.5' is neither an index nor a class name"),
    "truth": ("", {"json": b'{"label": true}'}, "'True' is neither"),
    "vector": ("", {"json": b"[0, 1, 0, 0]"}, ".json has a label twice"),
    "object": ("", {"json": b'{"label": {"a": 1}}'}, "is neither"),
    "huge": ("", {"cls": b"99999999999"}, "too large for a class index"),
    "weights": ("", {"json": b'{"labels": [0, 1], "weights": [1]}'}, "1 weights for 2 labels"),
    "bad weight": ("", {"json": b'{"labels": [0], "weights": [NaN]}'}, "a weight is a number from 0 on"),
}


@pytest.mark.parametrize(("rule", "members", "reason"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_labels_that_make_no_sense_are_told(tmp_path, rule, members, reason):
    good = [("a.jpg", image(0)), ("a.cls", b"0")]
    write_tar(tmp_path / "t.tar", [*good, ("b.jpg", image(1)), *((f"b.{e}", data) for e, data in members.items())])
    with pytest.raises(UserError, match=r"1 broken sample in .* 0 allowed: t\.tar b \(.*--max-rejected 1"):
        index(tmp_path, label=rule)
    made = index(tmp_path, label=rule, max_rejected=1)
    assert [where for where, _ in made.rejected] == ["t.tar b"]
    assert reason in made.rejected[0][1]
    assert [s.key for s in samples(tmp_path)] == ["a"]


def test_many_labels_and_weights(tmp_path):
    beside = [{"labels": [2, 0], "weights": [0.25, 0.75]}, {"labels": [1], "weights": [1.0]}, {"labels": []}]
    members = [
        (f"{i}.{e}", d) for i, j in enumerate(beside) for e, d in [("jpg", image(i)), ("json", json.dumps(j).encode())]
    ]
    write_tar(tmp_path / "t.tar", members)
    assert index(tmp_path).unlabelled == 1
    dataset = Dataset.open(tmp_path)
    assert [(s.labels, s.weights) for s in dataset.read_many(0, 0, 3)] == [((2, 0), (0.25, 0.75)), ((1,), ()), ((), ())]
    assert dataset.classes == ["0", "1", "2"]


def named(folder, *shards):
    """Write a tar for each list of class names."""
    for number, names in enumerate(shards):
        members = [
            (f"{number}-{i}.{e}", d) for i, n in enumerate(names) for e, d in [("jpg", image(i)), ("cls", n.encode())]
        ]
        write_tar(folder / f"{number}.tar", members)
    return folder


def test_names_become_sorted_classes_over_all_tars(tmp_path):
    shards = (["zebra", "cat"], ["ant", "zebra", ""], ["cat"])
    named(tmp_path, *shards)
    index(tmp_path)
    dataset = Dataset.open(tmp_path)
    assert dataset.classes == ["ant", "cat", "zebra"]
    assert [[dataset.classes[x] for x in s.labels] for s in samples(tmp_path)] == [
        [name] if name else [] for names in shards for name in names
    ]


def test_a_file_of_classes_gives_the_numbers(tmp_path):
    named(tmp_path, ["zebra", "1"], ["ant"])
    (tmp_path / "names.txt").write_text("zebra\nant\n7\n1\n\n")
    index(tmp_path, classes=tmp_path / "names.txt")
    assert Dataset.open(tmp_path).classes == ["zebra", "ant", "7", "1"]
    assert [s.labels for s in samples(tmp_path)] == [(0,), (3,), (1,)]  # "1" is a name here
    (tmp_path / "names.txt").write_text("zebra\nlion\n")
    made = index(tmp_path, classes=tmp_path / "names.txt", max_rejected=1)
    assert made.rejected == [("1.tar 1-0", "there is no class 'ant'")]
    assert [s.labels for s in samples(tmp_path)] == [(0,), (1,)]  # 1 is a number here
    (tmp_path / "names.txt").write_text("zebra\n")
    made = index(tmp_path, classes=tmp_path / "names.txt", max_rejected=2)
    assert made.rejected[0] == ("0.tar 0-1", "label 1 is beyond the 1 classes")
    for content, message in [(b"a\n\nb\n", "line 2 is empty"), (b"", "line 1 is empty"), (b"\xff", "cannot read")]:
        (tmp_path / "names.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            index(tmp_path, classes=tmp_path / "names.txt")


def test_names_and_numbers_together_need_a_file_of_classes(tmp_path):
    named(tmp_path, ["1", "2"], ["ant"])
    with pytest.raises(UserError, match=r"names in 1\.tar and numbers in 0\.tar; give --classes"):
        index(tmp_path)
    write_tar(
        tmp_path / "x" / "0.tar", [("a.jpg", image(0)), ("a.json", b"3"), ("b.jpg", image(1)), ("b.json", b'"c"')]
    )
    with pytest.raises(UserError, match="a has the label 3, others have class names; give --classes"):
        index(tmp_path / "x")


def test_a_number_that_is_no_class_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", image(0)), ("a.cls", b"1700000000")])
    with pytest.raises(UserError, match=r"label 1700000000 in 0\.tar would make 1,700,000,001 classes"):
        index(tmp_path)


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
        "t.tar twice": "several images, .jpg .jpg: choose with --image",
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


def test_workers_make_no_difference_and_what_is_done_is_kept(tmp_path):
    folder = named(tmp_path / "set", ["zebra", "cat"], ["ant", "zebra"], ["cat"], ["bee"])
    one = index(folder, tmp_path / "one", workers=1)
    index(folder, tmp_path / "two", workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.*")}
    again = index(folder, tmp_path / "one", workers=2)
    assert again.read == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (again.classes, again.samples) == (one.classes, one.samples)


def test_a_killed_index_goes_on_where_it_was(tmp_path):
    folder = write_webdataset(tmp_path / "set", samples=300, shard=10)
    index(folder, tmp_path / "whole")
    command = [sys.executable, "-c", "import sys; from shards.index import index; index(*sys.argv[1:], workers=1)"]
    out = tmp_path / "out"
    for wanted in (3, 12):
        process = subprocess.Popen([*command, str(folder), str(out)])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(list(out.glob("manifest/samples/*.parquet"))) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    there = len(list(out.glob("manifest/samples/0*.parquet")))
    assert there >= 12
    made = index(folder, out)
    assert made.read <= 30 - there
    assert tree(out) == tree(tmp_path / "whole")


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    folder = write_webdataset(tmp_path / "set", samples=300, shard=100)
    index(folder, tmp_path / "whole")
    out = tmp_path / "out"
    program = (
        "import resource, sys; from shards.index import index; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "from shards.errors import UserError\n"
        "try: index(*sys.argv[1:], workers=1)\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(out)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.startswith("cannot write "), done.stderr
    assert "File too large" in done.stdout
    assert [path for path in out.rglob("*") if path.is_file()] == []
    index(folder, out)
    assert tree(out) == tree(tmp_path / "whole")


def test_what_changed_is_read_again(tmp_path):
    folder = named(tmp_path / "set", ["zebra", "cat"], ["ant", "zebra"])
    index(folder)
    named(tmp_path / "new", [], [], ["bee"])
    shutil.copy(tmp_path / "new" / "2.tar", folder)
    made = index(folder)
    assert (made.read, made.classes) == (1, ["ant", "bee", "cat", "zebra"])
    assert [s.labels for s in samples(folder)] == [(3,), (2,), (0,), (3,), (1,)]
    named(tmp_path / "new", ["cow", "cat"])
    old = (folder / "0.tar").stat()
    shutil.copy(tmp_path / "new" / "0.tar", folder)
    os.utime(folder / "0.tar", ns=(old.st_atime_ns, old.st_mtime_ns))  # as rsync does
    changed = bytearray((folder / "0.tar").read_bytes())
    changed[136:147] = b"00000000777"  # another time in the first header
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed[:512])
    (folder / "0.tar").write_bytes(changed)
    os.utime(folder / "0.tar", ns=(old.st_atime_ns, old.st_mtime_ns))
    made = index(folder)
    assert (made.read, made.classes) == (1, ["ant", "bee", "cat", "cow", "zebra"])
    old = (folder / "1.tar").stat()
    named(tmp_path / "new", [], ["ant", "eland"])  # the same headers, another label
    os.utime(tmp_path / "new" / "1.tar", ns=(old.st_atime_ns, old.st_mtime_ns))
    shutil.copy2(tmp_path / "new" / "1.tar", folder)
    assert (folder / "1.tar").stat().st_size == old.st_size
    made = index(folder)
    assert (made.read, made.classes) == (1, ["ant", "bee", "cat", "cow", "eland"])
    (folder / "2.tar").unlink()
    made = index(folder)
    assert made.classes == ["ant", "cat", "cow", "eland"]
    assert sorted(path.name for path in (folder / "manifest" / "samples").iterdir()) == [
        "000000.parquet",
        "000001.parquet",
    ]


def test_a_drop_list_keeps_an_index_from_changing(tmp_path):
    folder = named(tmp_path / "set", ["zebra", "cat"])
    index(folder)
    write_exclude(folder, "v1", [(0, 1, "a duplicate")])
    assert index(folder).read == 0
    named(folder, ["zebra", "cat"], ["ant"])
    with pytest.raises(UserError, match=r"has drop lists \(v1\)"):
        index(folder)
    assert [s.key for s in samples(folder, exclude="v1")] == ["0-0"]


def test_bad_tars_are_all_named_and_the_rest_is_kept(tmp_path):
    folder = write_webdataset(tmp_path / "set", samples=40)
    tars = sorted(folder.glob("*.tar"))
    tars[1].write_bytes(tars[1].read_bytes()[:3000])
    tars[2].write_bytes(b"<html>")
    with pytest.raises(
        UserError, match=r"000001\.tar is cut short at byte \d+.*1 more bad tars of 4: .*000002\.tar is no"
    ):
        index(folder)
    with pytest.raises(UserError, match=r"making it never ended"):
        Dataset.open(folder)
    write_webdataset(tmp_path / "again", samples=40)
    for tar in tars[1:3]:
        shutil.copy(tmp_path / "again" / tar.name, tar)
    assert index(folder).read == 2


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


def names(url):
    return find_tars(url)[1]


def test_which_tars_a_url_means(tmp_path, monkeypatch):
    for name in ("b.tar", "a.tar", ".hidden.tar", "a10.tar", "a2.tar", "t/x.tar", "v/y.tar", "t/deep/z.tar"):
        write_tar(tmp_path / name, [])
    for name in ("a.parquet", "a_stats.json", "a.tar.idx", ".nv-meta/index.sqlite", ".nv-meta/dataset.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)  # of img2dataset and Energon
        (tmp_path / name).write_bytes(b"")
    assert (
        names(tmp_path) == names(f"{tmp_path}/") == names(tmp_path.as_uri()) == ["a.tar", "a10.tar", "a2.tar", "b.tar"]
    )
    assert names(f"{tmp_path}/a*.tar") == ["a.tar", "a10.tar", "a2.tar"]
    assert names(f"{tmp_path}/a{{2,10,}}.tar") == ["a2.tar", "a10.tar", "a.tar"]
    assert names(f"{tmp_path}/a?.tar") == ["a2.tar"]
    assert names(f"{tmp_path}/*/[x-y].tar") == ["t/x.tar", "v/y.tar"]
    assert names(f"{tmp_path}/{{v,t}}/*.tar") == ["v/y.tar", "t/x.tar"]
    assert names(tmp_path / "b.tar") == ["b.tar"]
    monkeypatch.chdir(tmp_path)
    assert names("b.tar") == names("[b].tar") == ["b.tar"]
    assert names("t/*.tar") == ["x.tar"]
    weird = write_tar(tmp_path / "w" / "{x}[1]" / "q.tar", []).parent
    assert names(weird) == ["q.tar"]  # a folder that is there is no pattern


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/nothing", "no folder"),
        ("{}", r"no tars in .* itself, but in its folders t, v; give one"),
        ("{}/t/deep", "no tars in .*; check the path"),
        ("{}/packed", "compressed ones such as x.tar.gz"),
        ("{}/z*.tar", "no tar fits"),
        ("{}/{{a,a}}.tar", "names a tar twice"),
        ("{}/{{a", "a brace is not closed"),
        ("{}/none.tar", "no object"),
    ],
)
def test_no_tars_is_an_error(tmp_path, url, message):
    write_tar(tmp_path / "t" / "x.tar", [])
    write_tar(tmp_path / "v" / "y.tar", [])
    for path in ("packed/x.tar.gz", "t/deep/x"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        find_tars(url.format(tmp_path))


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


@pytest.fixture
def web(tmp_path):
    write_webdataset(tmp_path / "site")
    for tar in (tmp_path / "site").iterdir():  # servers tell whole seconds: one of this second may be too new
        os.utime(tar, (tar.stat().st_mtime - 2,) * 2)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=tmp_path / "site")) as server:
        server.fault, server.bad, server.requests = "", 0, 0
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_tars_on_a_web_server(web, tmp_path):
    index(tmp_path / "site", tmp_path / "local")
    index(f"{web}/set-{{000000..000002}}.tar", tmp_path / "out")
    assert Dataset.open(tmp_path / "out").digest == Dataset.open(tmp_path / "local").digest
    assert samples(tmp_path / "out") == samples(tmp_path / "local")
    assert index(f"{web}/set-{{000000..000002}}.tar", tmp_path / "out").read == 0
    with pytest.raises(UserError, match="cannot list files; name each"):
        index(web, tmp_path / "out")
    with pytest.raises(UserError, match="takes no files: a web server; give --out"):
        index(f"{web}/set-{{000000..000002}}.tar")
    with pytest.raises(UserError, match=r"no object .*/set-000003\.tar"):
        index(f"{web}/set-{{000000..000003}}.tar", tmp_path / "more")


def test_tars_and_manifest_on_s3(s3, tmp_path):
    write_webdataset(tmp_path / "set")
    index(tmp_path / "set")
    bucket = open_store(f"{s3}/data/set")
    for path in sorted((tmp_path / "set").glob("*.tar")):
        bucket.write(path.name, path.read_bytes())
    assert index(f"{s3}/data/set", workers=2).read == 3
    dataset = Dataset.open(f"{s3}/data/set")
    assert dataset.digest == Dataset.open(tmp_path / "set").digest
    assert dataset.read_many(0, 2, 9) == samples(tmp_path / "set")[2:9]
    assert samples(f"{s3}/data/set") == samples(tmp_path / "set")
    assert index(f"{s3}/data/set").read == 0
    index(f"{s3}/data/set/set-*1.tar", tmp_path / "out")
    assert samples(tmp_path / "out") == samples(tmp_path / "set")[10:20]
    write_exclude(f"{s3}/data/set", "v1", [(0, 1, "x")])
    assert len(samples(f"{s3}/data/set", exclude="v1")) == 23
    with pytest.raises(UserError, match="exists and never changes"):
        write_exclude(f"{s3}/data/set", "v1", [])


def replace_with_same_size(path):
    """Make a tar anew with its samples in another order."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    size = path.stat().st_size
    path.unlink()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members[3:] + members[:3]:
            tar.addfile(member, io.BytesIO(data))
    assert path.stat().st_size == size


@pytest.mark.parametrize("where", ["local", "web"])
def test_an_index_that_no_longer_fits_is_found_on_reading(web, tmp_path, where):
    path = tmp_path / "site" / "set-000001.tar"
    index(tmp_path / "site" if where == "local" else f"{web}/set-{{000000..000002}}.tar", tmp_path / "out")
    whole, indexed = path.read_bytes(), samples(tmp_path / "out")

    replace_with_same_size(path)
    dataset = Dataset.open(tmp_path / "out")
    message = r"set-000001\.tar is not the tar that .* knows: sample000\d+ is not at byte \d+.*index them again"
    for read in (lambda: dataset.read(1, 4), lambda: dataset.read_many(1, 2, 5)):
        with pytest.raises(UserError, match=message):
            read()
    assert dataset.read(0, 0).key == "sample00000"

    path.write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"set-000001\.tar ends before byte .*cut short"):
        Dataset.open(tmp_path / "out").read(1, 9)

    path.write_bytes(whole + bytes(10240))  # the samples are where they were
    assert samples(tmp_path / "out") == indexed
    assert (
        index(tmp_path / "site" if where == "local" else f"{web}/set-{{000000..000002}}.tar", tmp_path / "out").read
        == 1
    )
    assert len(samples(tmp_path / "out")) == 24


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
    assert "4 classes, 1 samples without label" in done.stdout
    assert "left out: 0.tar c: empty file" in done.stdout
    done = runner.invoke(app, [*command, "--json"])
    made = json.loads(done.stdout)
    assert (made["read"], made["samples"], made["rejected"]) == (0, 2, [["0.tar c", "empty file"]])
