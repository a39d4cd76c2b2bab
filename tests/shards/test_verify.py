"""What verify finds in damaged data sets, and what it leaves alone."""

import json
import os
import re
import shutil
import tarfile

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from launch.cli import app
from shards import manifest
from shards.build import build
from shards.dataset import Dataset
from shards.droplist import read_exclude, write_exclude
from shards.errors import PatchmillError, UserError
from shards.index import index
from shards.store import open_store
from shards.verify import Fault, verify
from tests.shards.foreign import image, write_tar, write_webdataset
from tests.shards.images import encode, make_source, tree
from tests.shards.servers import serve_faults


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An index of 24 samples in three tars."""
    folder = write_webdataset(tmp_path_factory.mktemp("made") / "set")
    index(folder)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


TAR = "set-000001.tar"


def row(folder, number, shard=1):
    return manifest.read_table((folder / manifest.samples_path(shard)).read_bytes()).to_pylist()[number]


def change(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def change_table(folder, column, number, value, shard=1):
    store, path = open_store(folder), manifest.samples_path(shard)
    table, receipt = manifest.read_table(store.read(path)), manifest.read_receipt(store, path)
    rows = table.to_pydict()
    rows[column][number] = value
    manifest.write_samples(store, path, rows, receipt)


def faults(found):
    return [(fault.tar, fault.key, fault.reason) for fault in found.faults]


def test_what_is_whole_has_no_faults(made, tmp_path):
    before = tree(made)
    found = verify(made, decode=True)
    assert (found.faults, found.faulty, found.samples, found.shards) == ([], 0, 24, 3)
    assert found.bytes == sum(path.stat().st_size for path in made.glob("*.tar"))
    assert tree(made) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_what_we_built_has_no_faults(tmp_path, workers):
    source = make_source(tmp_path / "source")
    build(source, tmp_path / "built", shard_samples=7, workers=1)
    assert verify(tmp_path / "built", decode=True, workers=workers).faults == []


def test_many_labels_with_weights_that_we_built_have_no_faults(tmp_path):
    labels = [{"labels": ["7", "3"], "weights": [0.1, 0.9]}, {"labels": ["3"]}, {"labels": []}]
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(image(i))
    lines = [json.dumps({"path": f"{i}.jpg"} | each) for i, each in enumerate(labels)]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    build(tmp_path / "table.jsonl", tmp_path / "built", captions=True, workers=1)
    assert verify(tmp_path / "built").faults == []
    [weighted] = [place for place in range(3) if len(row(tmp_path / "built", place, 0)["labels"]) == 2]
    change_table(tmp_path / "built", "weights", weighted, [0.5, 0.5], shard=0)
    assert [(fault.index, fault.reason[:11]) for fault in verify(tmp_path / "built").faults] == [
        (weighted, "the weights")
    ]


def test_a_changed_byte_of_an_image(copy):
    place = row(copy, 3)
    change(copy / TAR, place["offset"] + place["size"] // 2, b"\0\1\2\3")
    found = verify(copy)
    assert found.faults[0] == Fault(
        "its bytes changed: their hash is another one", 1, TAR, 3, place["key"], place["offset"]
    )
    assert found.faults[1].reason.startswith("the tar's sha256 is ")
    assert (len(found.faults), found.faulty) == (2, 1)


def test_a_changed_header_stops_the_walk_and_no_more(copy):
    place = row(copy, 3)
    change(copy / TAR, place["offset"] - 512 + 148, b"0000000\0")
    found = verify(copy)
    assert [fault.index for fault in found.faults] == [None, 3]
    assert "is damaged at byte" in found.faults[0].reason
    assert found.faults[1].reason == "the tar header before it is another one"  # those behind it can be read


def test_a_tar_that_is_cut_short(copy):
    place = row(copy, 6)
    with open(copy / TAR, "r+b") as file:
        file.truncate(place["offset"] + 10)
    found = verify(copy)
    assert [fault.index for fault in found.faults] == [None, None, 6, 7, 8, 9]
    assert found.faults[0].reason == f"the tar has {place['offset'] + 10} bytes, should have {row_bytes(copy)}"
    assert "is cut short at byte" in found.faults[1].reason
    assert found.faults[2].reason == "the tar ends before its end"
    assert found.faulty == 4


@pytest.mark.parametrize("where", ["local", "web"])
def test_what_a_cut_tar_still_holds_is_read_once_the_rest_is_quarantined(copy, where):
    whole = Dataset.open(copy)
    images = [whole.read(1, index).image for index in range(6)]
    with open(copy / TAR, "r+b") as file:
        file.truncate(row(copy, 6)["offset"] + 10)
    verify(copy, quarantine="v1")
    with serve_faults(copy) as server:
        dataset = Dataset.open(copy if where == "local" else server.url, "v1")
        assert dataset.shard_sizes.tolist() == [10, 6, 4]
        assert [sample.image for sample in dataset.read_many(1, 0, 6)] == images
        assert [dataset.read(1, index).image for index in range(6)] == images
        assert len([dataset[index] for index in range(20)]) == 20
        with pytest.raises(UserError, match=rf"{TAR} ends before byte .*cut short"):
            Dataset.open(dataset.url).read(1, 6)


def row_bytes(folder, shard=1):
    return manifest.read_table((folder / manifest.SHARDS).read_bytes())["bytes"][shard].as_py()


def test_a_tar_that_is_missing(copy):
    (copy / TAR).unlink()
    found = verify(copy)
    assert found.faults == [Fault("the tar is missing", 1, TAR, whole=True)]
    assert found.faulty == 10


@pytest.mark.parametrize("damage", ["missing", "damaged", "rows"])
def test_a_sample_table_that_is_bad(copy, damage):
    path = copy / manifest.samples_path(1)
    if damage == "missing":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(b"no parquet at all")
    else:
        shutil.copy(copy / manifest.samples_path(2), path)
    found = verify(copy)
    assert len(found.faults) == 1
    assert found.faults[0].whole
    assert "its sample table" in found.faults[0].reason
    assert found.faulty == 10


def test_a_tar_made_anew(copy):
    write_tar(copy / TAR, [(f"new{i}.{e}", d) for i in range(10) for e, d in [("jpg", image(90 + i)), ("cls", b"0")]])
    found = verify(copy)
    extra = [fault for fault in found.faults if fault.reason == "it is in the tar, but not in the sample table"]
    assert all(fault.key.startswith("new") and fault.index is None and fault.offset for fault in extra)
    moved = [fault for fault in found.faults if fault.reason.startswith("its key in the tar is new")]  # by chance
    assert len(extra) + len(moved) == 10
    assert found.faulty == 10


CHANGES = {
    "key": ("other", "its key in the tar is sample00012"),
    "offset": (1024, "no file begins there in the tar"),
    "size": (7, "bytes in the tar, 7 in the table"),
    "format": ("png", "it is jpg of 25 x 16, not png of 25 x 16"),
    "width": (99, "it is jpg of 25 x 16, not jpg of 99 x 16"),
    "labels": ([1], "its labels in the tar are [0], [1] in the table"),
    "weights": ([0.5], "the weights of its labels are [] in the tar, [0.5] in the table"),
    "member": (1, "the tar header before it is another one"),
    "xxh128": (bytes(16), "its bytes changed"),
}


@pytest.mark.parametrize(("column", "value", "reason"), [(c, *rest) for c, rest in CHANGES.items()], ids=CHANGES)
def test_every_column_is_compared(copy, column, value, reason):
    change_table(copy, column, 2, value)
    found = verify(copy)
    mine = [fault for fault in found.faults if fault.index == 2]
    assert len(mine) == 1
    assert reason in mine[0].reason
    assert (mine[0].shard, mine[0].tar) == (1, TAR)
    assert found.faulty == 1


def test_two_rows_in_one_place(copy):
    change_table(copy, "offset", 2, row(copy, 5)["offset"])
    found = verify(copy)
    assert {fault.index for fault in found.faults} >= {2}
    assert any(fault.reason == "another row of the sample table has the same place" for fault in found.faults)


def test_a_label_that_changed_in_the_tar(copy):
    whole = (copy / TAR).read_bytes()
    with tarfile.open(copy / TAR) as tar:
        member = tar.getmember("sample00014.cls")
    assert whole[member.offset_data : member.offset_data + 1] == b"2"
    change(copy / TAR, member.offset_data, b"1")
    found = verify(copy)
    assert faults(found)[0] == (TAR, "sample00014", "its labels in the tar are [1], [2] in the table")


def test_names_of_classes_and_weights_are_compared(tmp_path):
    members = [
        ("a.jpg", image(0)), ("a.json", b'{"labels": ["cat", "ant"], "weights": [0.1, 0.9]}'),
        ("b.jpg", image(1)), ("b.json", b'{"label": "bee"}'),
        ("c.jpg", b"broken"), ("c.json", b'{"label": "bee"}'),
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    index(tmp_path, max_rejected=1)
    assert verify(tmp_path).faults == []
    info = json.loads((tmp_path / manifest.DATASET).read_text())
    shards = manifest.read_table((tmp_path / manifest.SHARDS).read_bytes())
    info["classes"] = ["ant", "cat", "bee"]
    info["digest"] = manifest.digest(info["classes"], shards["sha256"].to_pylist(), info["build"])
    (tmp_path / manifest.DATASET).write_text(json.dumps(info))
    assert {fault.key for fault in verify(tmp_path).faults} == {"a", "b"}


def test_totals_are_compared(copy):
    info = json.loads((copy / manifest.DATASET).read_text())
    (copy / manifest.DATASET).write_text(json.dumps(info | {"samples": 25}))
    assert faults(verify(copy)) == [("", "", "manifest/dataset.json says 25 samples, manifest/shards.parquet 24")]


def test_a_tar_that_is_in_no_manifest(tmp_path):
    built = tmp_path / "out"
    build(make_source(tmp_path / "source"), built, workers=1)
    shutil.copy(built / manifest.shard_path(0), built / manifest.shard_path(9))
    assert faults(verify(built)) == [
        ("shards/000009.tar", "", "it is not in the manifest, but readers of shards/*.tar would read it; remove it")
    ]


def test_receipts_are_compared(copy):
    table = manifest.read_table((copy / manifest.SHARDS).read_bytes())
    rows = table.to_pydict()
    rows["sha256"][1] = "0" * 64
    manifest.write_table(open_store(copy), manifest.SHARDS, pa.table(rows, schema=manifest.SHARDS_SCHEMA))
    with pytest.raises(UserError, match="do not belong together"):
        verify(copy)
    info = json.loads((copy / manifest.DATASET).read_text())
    info["digest"] = manifest.digest(info["classes"], rows["sha256"], info["build"])
    (copy / manifest.DATASET).write_text(json.dumps(info))
    found = verify(copy)
    assert [reason.split(" is ")[0] for _, _, reason in faults(found)] == ["sha256", "the tar's sha256"]


def test_damage_inside_an_image_shows_when_it_is_decoded(tmp_path):
    whole = encode(1, "JPEG", (64, 64))
    middle = len(whole) // 2
    bad = whole[:middle] + b"\xff\xda" * 10 + whole[middle + 20 :]  # scans that begin in the middle of one
    write_tar(tmp_path / "0.tar", [("a.jpg", whole), ("b.jpg", bad), ("c.png", image(2, "png"))])
    index(tmp_path)
    assert verify(tmp_path).faults == []
    found = verify(tmp_path, decode=True)
    assert [(fault.key, fault.index) for fault in found.faults] == [("b", 1)]
    assert found.faults[0].reason.startswith("it does not decode: ")


def test_quarantine_is_a_new_drop_list_on_top_of_the_old(copy):
    first, second = row(copy, 3), row(copy, 7)
    write_exclude(copy, "v1", [(0, 2, "a duplicate"), (1, 3, "blurred")])
    for place in (first, second):
        change(copy / TAR, place["offset"] + 100, b"\0\1\2\3")
    found = verify(copy, exclude="v1", quarantine="v2")
    assert [(fault.index) for fault in found.faults] == [7, None]
    assert (found.faulty, found.dropped, found.quarantine) == (1, 2, "v2")
    assert read_exclude(copy, "v2") == [
        (0, 2, "a duplicate"), (1, 3, "blurred"), (1, 7, "its bytes changed: their hash is another one"),
    ]  # fmt: skip
    assert read_exclude(copy, "v1") == [(0, 2, "a duplicate"), (1, 3, "blurred")]
    assert len(Dataset.open(copy, "v2")) == 21
    again = verify(copy, exclude="v2")
    assert (again.faults, len(again.notes)) == ([], 1)  # the tar is another one still
    assert again.notes[0].reason.startswith("the tar's sha256 is ")
    before = tree(copy)
    for version, message in [("v2", "exists and never changes"), ("../x", "use letters")]:
        with pytest.raises(UserError, match=message):
            verify(copy, quarantine=version)
    with pytest.raises(UserError, match="no drop list 'v9'"):
        verify(copy, exclude="v9")
    assert tree(copy) == before


DAMAGES = {
    "byte": (lambda tar, place: change(tar, place["offset"] + 100, b"\0\1\2\3"), 1),
    "header": (lambda tar, place: change(tar, place["offset"] - 512 + 148, b"0000000\0"), 1),
    "cut": (lambda tar, place: os.truncate(tar, place["offset"] + 10), 4),
    "missing": (lambda tar, place: tar.unlink(), 10),
}


@pytest.mark.parametrize(("damage", "dropped"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_quarantined_is_no_fault_any_more(copy, damage, dropped):
    damage(copy / TAR, row(copy, 6))
    assert verify(copy, quarantine="v1").faulty == dropped
    again = verify(copy, exclude="v1")
    assert again.faults == []
    assert {note.tar for note in again.notes} == {TAR}
    assert verify(copy, exclude="v1", quarantine="v2").faulty == 0


def test_a_drop_list_of_whole_samples_explains_no_damage(copy):
    write_exclude(copy, "v1", [(1, 2, "blurred")])
    with tarfile.open(copy / TAR) as tar:
        member = tar.getmember("sample00014.json")
    change(copy / TAR, member.offset_data + 6, b"9")  # no label stands there
    found = verify(copy, exclude="v1")
    assert ([fault.reason[:18] for fault in found.faults], found.notes) == (["the tar's sha256 i"], [])


def test_faults_before_a_damaged_header_are_told_too(copy):
    change(copy / TAR, row(copy, 1)["offset"] + 100, b"\0\1\2\3")
    change(copy / TAR, row(copy, 5)["offset"] - 512 + 148, b"0000000\0")
    assert {fault.index for fault in verify(copy).faults} == {None, 1, 5}


def test_a_drop_list_that_cannot_be_written_costs_no_finding(copy):
    place = row(copy, 3)
    change(copy / TAR, place["offset"] + 100, b"\0\1\2\3")
    (copy / manifest.EXCLUDE).write_text("a file")
    found = verify(copy, quarantine="v1")
    assert (found.faults[0].index, found.faulty, found.quarantine) == (3, 1, None)
    assert re.match(r"cannot write .*exclude/v1\.parquet: ", found.unwritten)
    done = CliRunner().invoke(app, ["shards", "verify", str(copy), "--quarantine", "v1"], env={"COLUMNS": "200"})
    assert place["key"] in done.stdout
    assert isinstance(done.exception, UserError)


def test_a_web_server_is_refused_before_anything_is_read(copy):
    with serve_faults(copy) as server:
        url = server.url
        with pytest.raises(UserError, match="takes no drop list: a web server"):
            verify(url, quarantine="v1")
        assert server.requests == 3  # dataset.json, until it came the same twice, and shards.parquet
        with pytest.raises(UserError, match="a plain web server takes no files"):
            open_store(url).create("x", b"1")


def test_a_tar_that_is_missing_is_quarantined_whole(copy):
    write_exclude(copy, "v1", [(1, 3, "blurred")])
    (copy / TAR).unlink()
    verify(copy, exclude="v1", quarantine="v2")
    dataset = Dataset.open(copy, "v2")
    assert dataset.shard_sizes.tolist() == [10, 0, 4]
    assert [dataset[i].key for i in (0, 10, 13)] == ["sample00000", "sample00020", "sample00023"]


def test_a_network_fault_is_no_fault_of_the_data(copy, monkeypatch):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "0")
    with serve_faults(copy) as server:
        url = server.url
        assert verify(url).faults == []
        server.fault, server.bad = "error", 99
        with pytest.raises(PatchmillError, match="500"):
            verify(url)


def test_a_data_set_on_s3_is_checked_and_quarantined(s3, copy):
    place = row(copy, 3)
    change(copy / TAR, place["offset"] + 100, b"\0\1\2\3")
    store = open_store(f"{s3}/data")
    for path, data in tree(copy).items():
        store.write(path, data)
    found = verify(f"{s3}/data", quarantine="bad", workers=2)
    assert [fault.index for fault in found.faults] == [3, None]
    assert len(Dataset.open(f"{s3}/data", "bad")) == 23


def test_the_command_names_faults_and_tells_by_its_exit_code(copy):
    runner = CliRunner()
    good = runner.invoke(app, ["shards", "verify", str(copy)])
    assert good.exit_code == 0
    assert good.stdout.startswith("no faults: 24 samples in 3 shards")
    place = row(copy, 3)
    change(copy / TAR, place["offset"] + 100, b"\0\1\2\3")
    bad = runner.invoke(app, ["shards", "verify", str(copy), "--quarantine", "q1"], env={"COLUMNS": "200"})
    assert bad.exit_code == 1
    for word in (
        TAR,
        place["key"],
        f"{place['offset']:,}",
        "its bytes changed",
        "2 faults in 1 sample:",
        'q1 leaves out 1 sample; runs use it once told: data.exclude = "q1"',
    ):
        assert word in bad.stdout
    with_list = runner.invoke(app, ["shards", "verify", str(copy), "--exclude", "q1"])
    assert with_list.exit_code == 0
    assert with_list.stdout.startswith("no faults: ")
    assert f"{TAR}: the tar's sha256 is " in with_list.stderr
    told = runner.invoke(app, ["shards", "verify", str(copy), "--json", "--decode"])
    assert told.exit_code == 1
    assert json.loads(told.stdout)["faults"][0]["key"] == place["key"]
