"""WebDataset tars as a source: written by stock webdataset, and by strangers."""

import io
import json
import re
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from launch.cli import app
from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from shards.manifest import parse_info
from shards.sources.open import open_source
from shards.sources.reader import Reader
from tests.shards.images import encode, tree
from tests.shards.sources.servers import serve, upload


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            add(tar, name, data)
    return path


@pytest.fixture
def stock(tmp_path):
    """A set written by webdataset's own ShardWriter."""
    from webdataset import ShardWriter

    (tmp_path / "set").mkdir()
    with ShardWriter(str(tmp_path / "set/x-%03d.tar"), maxcount=4, verbose=0) as writer:
        for n in range(10):
            writer.write({"__key__": f"folder/{n:04d}", "jpg": encode(n), "cls": n % 3, "txt": f"caption {n}"})
    return tmp_path / "set"


def read(source, unpacked):
    return list(Reader(source.root, unpacked).read_all(source.items()))


@pytest.mark.parametrize("where", ["disk", "s3", "web", "pattern", "one"])
def test_what_stock_webdataset_wrote(stock, where, request, tmp_path):
    with serve(stock) as web:
        url = {
            "disk": lambda: stock,
            "s3": lambda: upload(stock, f"{request.getfixturevalue('s3')}/a b"),
            "web": lambda: f"{web}/x-{{000..002}}.tar",
            "pattern": lambda: f"{stock}/x-*.tar",
            "one": lambda: stock / "x-001.tar",
        }[where]()
        source = open_source(url, unpacked=tmp_path / "u")
        got = read(source, tmp_path / "u")
    assert source.kind == "tars"
    assert source.classes == ["0", "1", "2"]
    assert not source.multi_label
    expected = range(4, 8) if where == "one" else range(10)
    assert [(item.key, item.labels, data) for item, data in got] == [
        (f"folder/{n:04d}", (n % 3,), encode(n)) for n in expected
    ]
    assert {item.file for item, _ in got} <= {f"x-00{n}.tar" for n in range(3)}  # read in place


def test_img2dataset_layout_with_labels_in_json(tmp_path):
    for shard in range(2):
        samples = []
        for n in range(3):
            key = f"{shard:05d}{n:04d}"
            about = {"url": "http://x", "labels": [["cat", "dog"], [], ["ape"]][n], "weights": [[0.5, 1], [], [1]][n]}
            samples += [(f"{key}.jpg", encode(n)), (f"{key}.json", json.dumps(about).encode()), (f"{key}.txt", b"hi")]
        write(tmp_path / f"set/{shard:05d}.tar", samples)
        pq.write_table(pa.table({"url": ["http://x"]}), tmp_path / f"set/{shard:05d}.parquet")
        (tmp_path / f"set/{shard:05d}_stats.json").write_text("{}")
    source = open_source(tmp_path / "set", unpacked=tmp_path / "u")
    assert source.classes == ["ape", "cat", "dog"]
    assert source.multi_label
    items = list(source.items())
    assert [item.labels for item in items] == [(1, 2), (), (0,)] * 2
    assert [item.weights for item in items] == [(0.5, 1.0), (), (1.0,)] * 2


def test_options(tmp_path):
    files = [("a.jpg", b"1"), ("a.png", encode(2, "PNG")), ("a.meta.json", b'{"info": {"kind": "dog"}}')]
    path = write(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match=r"a has several images.*image=jpg"):
        open_source(path, unpacked=tmp_path / "u")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    options = {"image": "png", "label": "meta.json:info.kind", "classes": str(tmp_path / "names.txt")}
    source = open_source(path, unpacked=tmp_path / "u", **options)
    assert [(item.labels, data) for item, data in read(source, tmp_path / "u")] == [((1,), encode(2, "PNG"))]


def test_the_command_says_that_no_image_has_a_label(tmp_path):
    write(tmp_path / "x.tar", [("a.jpg", encode(1)), ("a.json", b'{"kind": "dog"}')])
    runner = CliRunner()
    command = ["shards", "build", str(tmp_path / "x.tar"), str(tmp_path / "out"), "--dry-run"]
    done = runner.invoke(app, [*command, "--label", "json:kin"])
    assert done.exit_code == 0
    assert "no image has a label; if" in done.stdout
    assert "no image has a label" not in runner.invoke(app, [*command, "--label", "json:kind"]).stdout


def numbered_anew(folder, names, count=4):
    for tar, name in enumerate(names):
        files = [(f"{n:06d}.{end}", data) for n in range(count)
                 for end, data in (("jpg", encode(10 * tar + n)), ("cls", b"%d" % tar))]  # fmt: skip
        write(folder / name, files)


def test_keys_that_each_tar_numbers_anew_get_its_name(tmp_path):
    numbered_anew(tmp_path / "set", ["00000.tar", "00001.tar", "x.2.tar"])
    write(tmp_path / "set/other.tar", [("unlike.jpg", encode(99)), ("unlike.cls", b"3")])
    made = build(tmp_path / "set", tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    assert made.parts["all"].samples == len(dataset) == 13
    expected = {
        f"{tar}/{n:06d}": encode(10 * k + n) for k, tar in enumerate(["00000", "00001", "x_2"]) for n in range(4)
    }
    assert {s.key: s.image for s in dataset.read_many(0, 0, 13)} == expected | {"other/unlike": encode(99)}
    one = open_source(tmp_path / "set/00001.tar", unpacked=tmp_path / "u")
    assert [item.key for item in one.items()] == [f"{n:06d}" for n in range(4)]  # nothing to tell it from
    folders = open_source(f"{tmp_path}/*/0000*.tar", unpacked=tmp_path / "u")
    assert {item.key.rpartition("/")[0] for item in folders.items()} == {"set/00000", "set/00001"}


def test_keys_alike_but_for_dots_get_the_name_of_their_tar(tmp_path):
    write(tmp_path / "set/a.tar", [("a.b/c.jpg", encode(0)), ("a.b/c.cls", b"0")])
    write(tmp_path / "set/b.tar", [("a_b/c.jpg", encode(1)), ("a_b/c.cls", b"0")])
    assert [item.key for item in open_source(tmp_path / "set", unpacked=tmp_path / "u").items()] == [
        "a/a_b/c",
        "b/a_b/c",
    ]


def test_a_key_twice_in_one_tar_is_no_reason_for_its_name(tmp_path):
    files = [("a.jpg", encode(0)), ("a.cls", b"0"), ("b.jpg", encode(1)), ("b.cls", b"0")]
    write(tmp_path / "set/x.tar", files + files)
    write(tmp_path / "set/y.tar", [("c.jpg", encode(2)), ("c.cls", b"0")])
    with pytest.raises(UserError, match=r"x\.tar at byte \d+ and x\.tar at byte \d+ have one key, a"):
        build(tmp_path / "set", tmp_path / "out")


def test_a_key_twice_in_a_row_is_rejected_with_the_reason(tmp_path):
    files = [("b.jpg", encode(1)), ("b.cls", b"2"), ("a.jpg", encode(2)), ("a.cls", b"0"), ("a.jpg", encode(3))]
    path = write(tmp_path / "x.tar", files)
    reason = "the key is there twice, .jpg .jpg: rename one, or remove it"
    with pytest.raises(UserError, match=re.escape(f"x.tar at byte 3072, a ({reason})")):
        build(path, tmp_path / "out")
    made = build(path, tmp_path / "out", max_rejected=1)
    assert made.parts["all"].rejected == [("x.tar at byte 3072, a", reason)]
    dataset = Dataset.open(tmp_path / "out")
    assert [(s.key, s.labels, s.image) for s in dataset.read_many(0, 0, 1)] == [("b", (2,), encode(1))]
    assert not parse_info((tmp_path / "out/manifest/dataset.json").read_bytes(), "out").build["multi_label"]
    assert made.classes == ["0", "1", "2"]


def test_tars_without_images(tmp_path):
    path = write(tmp_path / "x.tar", [("a.cls", b"0")])
    source = open_source(path, unpacked=tmp_path / "u")
    assert list(source.items()) == []
    assert source.others == {"samples without image": 1}


def test_strangers_names_touch_no_file(tmp_path):
    names = ["../../up", "/abs/x", "Ünï cødé/日 本", "a.b/c", "..", "n" * 150]
    files = [(f"{name}.{end}", data) for n, name in enumerate(names[:4] + names[5:])
             for end, data in (("jpg", encode(n)), ("cls", b"0"))]  # fmt: skip
    files += [("....jpg", encode(9)), ("README", b"x"), ("only.cls", b"0")]
    write(tmp_path / "in/x.tar", files)
    with tarfile.open(tmp_path / "in/x.tar", "a") as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    source = open_source(tmp_path / "in", unpacked=tmp_path / "u")
    got = {item.key: data for item, data in read(source, tmp_path / "u")}
    assert got == {"__/__/up": encode(0), "abs/x": encode(1), "Ünï cødé/日 本": encode(2), "a_b/c": encode(3),
                   "n" * 150: encode(4)}  # fmt: skip
    assert source.others["samples without image"] == 1
    assert source.others["links"] == 1
    assert all(name.startswith(("in/x.tar", "u/")) for name in tree(tmp_path))


def test_walked_once_and_anew_when_a_tar_has_changed(stock, tmp_path):
    first = list(open_source(stock, unpacked=tmp_path / "u").items())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "u").glob("*.parquet")}
    assert len(before) == 3
    assert list(open_source(stock, unpacked=tmp_path / "u").items()) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    write(stock / "x-002.tar", [("new.jpg", encode(0)), ("new.cls", b"5")])
    source = open_source(stock, unpacked=tmp_path / "u")
    assert [item.key for item in source.items()][8:] == ["new"]
    assert len(source.classes) == 6
    assert sum(path.stat().st_mtime_ns != before[path] for path in before) == 1


@pytest.mark.parametrize(
    ("label", "message"),
    [(b"999999999", "would make"), (b'[["a"]]', "labels of a make no sense"), (b"[1, 1]", "make no sense")],
)
def test_labels_that_make_no_sense(tmp_path, label, message):
    path = write(tmp_path / "x.tar", [("a.jpg", encode(0)), ("a.cls", label)])
    with pytest.raises(UserError, match=message):
        open_source(path, unpacked=tmp_path / "u")


def test_damaged_tars(stock, tmp_path):
    data = (stock / "x-001.tar").read_bytes()
    (stock / "x-001.tar").write_bytes(data[:3000])
    with pytest.raises(UserError, match=r"x-001\.tar is cut short"):
        open_source(stock, unpacked=tmp_path / "u")
    (stock / "x-001.tar").write_bytes(b"<html>404</html>" * 99)
    with pytest.raises(UserError, match=r"x-001\.tar is no tar"):
        open_source(stock, unpacked=tmp_path / "u")
