"""Image bytes in Parquet as the Hugging Face hub has them: unpacked once, by any number of processes, whole or not."""

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.errors import UserError
from shards.sources.open import open_source
from shards.sources.parquet import Parquet
from shards.sources.reader import Reader
from tests.shards.images import encode, tree
from tests.shards.sources.servers import serve, upload

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["tench", "goldfish", "great white"], "_type": "ClassLabel"},
}


def write(path: Path, labels: list, first: int = 0, features: dict | None = FEATURES, **kwargs) -> Path:
    """Write a file as ``datasets`` does: image{bytes,path}, label, and what it notes in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"image": {"bytes": encode(first + n), "path": f"../{n}.jpg"}, "label": label} for n, label in enumerate(labels)
    ]
    table = pa.Table.from_pylist(rows)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3, **kwargs)
    return path


@pytest.fixture
def hub(tmp_path):
    """A data set in the layout of the hub."""
    write(tmp_path / "hub/data/train-00000-of-00002.parquet", [0, 1, 2, 1], 0)
    write(tmp_path / "hub/data/train-00001-of-00002.parquet", [2], 10)
    write(tmp_path / "hub/data/validation-00000-of-00001-0123abcd.parquet", [1, 0], 20)
    write(tmp_path / "hub/data/test-00000-of-00001.parquet", [-1, -1], 30)
    (tmp_path / "hub/README.md").write_text("# card")
    return tmp_path / "hub"


def read(source, unpacked):
    return list(Reader(source.root, unpacked).read_all(source.items()))


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_hub_layout(hub, where, request, tmp_path):
    url = hub if where == "disk" else upload(hub, f"{request.getfixturevalue('s3')}/p")
    source = open_source(url, unpacked=tmp_path / "u")
    got = read(source, tmp_path / "u")
    assert source.kind == "parquet"
    assert source.classes == ["tench", "goldfish", "great white"]
    assert not source.multi_label
    assert source.others == {"images without label": 2}
    assert [(item.part, item.labels) for item, _ in got] == [
        ("train", (0,)), ("train", (1,)), ("train", (2,)), ("train", (1,)), ("train", (2,)),
        ("validation", (1,)), ("validation", (0,)),
    ]  # fmt: skip
    assert [data for _, data in got] == [encode(n) for n in (0, 1, 2, 3, 10, 20, 21)]
    assert got[3][0].key == "data/train-00000-of-00002/000003"
    assert len({item.key for item, _ in got}) == 7
    assert all(item.changed > 0 for item, _ in got)


def test_parts_are_told_by_all_files_or_by_none(hub, tmp_path):
    write(hub / "data/extra.parquet", [0])
    with pytest.raises(UserError, match=r"data/extra\.parquet tells no part, data/test-.*\.parquet tells test; "):
        open_source(hub, unpacked=tmp_path / "u")
    for number in range(2):
        write(tmp_path / f"whole/all-{number:05d}-of-00002.parquet", [0])
    write(tmp_path / "whole/more.parquet", [1])
    assert [item.part for item in open_source(tmp_path / "whole", unpacked=tmp_path / "u").items()] == ["", "", ""]


def test_long_names(tmp_path):
    names = ["x" * 240, "x" * 239 + "y", "é" * 120, f"{'f' * 250}/{'g' * 200}"]
    for number, name in enumerate(names):
        write(tmp_path / "set" / f"{name}.parquet", [number % 3], number)
    got = read(Parquet(str(tmp_path / "set"), tmp_path / "u"), tmp_path / "u")
    assert {item.key: data for item, data in got} == {
        f"{name}/000000": encode(number) for number, name in enumerate(names)
    }
    assert len({item.file for item, _ in got}) == 4


def test_one_file_over_http(hub, tmp_path):
    with serve(hub) as web:
        source = open_source(f"{web}/data/train-00000-of-00002.parquet", unpacked=tmp_path / "u")
        got = read(source, tmp_path / "u")
    assert [(item.part, data) for item, data in got] == [("", encode(n)) for n in range(4)]


@pytest.mark.parametrize(
    ("labels", "features", "classes", "expected", "multi"),
    [
        ([2, 0], None, ["0", "1", "2"], [(2,), (0,)], False),
        (["b", "a"], None, ["a", "b"], [(1,), (0,)], False),
        ([["b", "a"], []], None, ["a", "b"], [(1, 0), ()], True),
        ([[1], [0, 1]], {"label": {"feature": FEATURES["label"], "_type": "List"}}, FEATURES["label"]["names"],
         [(1,), (0, 1)], True),
    ],
)  # fmt: skip
def test_labels(tmp_path, labels, features, classes, expected, multi):
    source = open_source(write(tmp_path / "x.parquet", labels, features=features), unpacked=tmp_path / "u")
    assert source.classes == classes
    assert source.multi_label == multi
    assert [item.labels for item in source.items()] == expected


def test_plain_bytes_options_and_missing_images(tmp_path):
    rows = [{"photo": encode(0), "thumb": b"x", "kind": "a", "id": "../x.1"},
            {"photo": None, "thumb": b"x", "kind": "b", "id": "y"}]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="several columns of bytes, photo, thumb"):
        open_source(tmp_path / "x.parquet", unpacked=tmp_path)
    with pytest.raises(UserError, match="no column of labels"):
        open_source(tmp_path / "x.parquet", unpacked=tmp_path, image="photo")
    source = open_source(tmp_path / "x.parquet", unpacked=tmp_path, image="photo", label="kind", key="id")
    got = read(source, tmp_path)
    assert [(item.key, data) for item, data in got] == [("__/x_1", encode(0)), ("y", b"")]


def test_unpacked_once_and_anew_when_the_file_has_changed(hub, tmp_path):
    unpacked = tmp_path / "u"
    list(Parquet(str(hub), unpacked).items())
    before = {path: path.stat().st_mtime_ns for path in unpacked.rglob("*.bin")}
    assert len(before) == 4
    list(Parquet(str(hub), unpacked).items())
    assert {path: path.stat().st_mtime_ns for path in unpacked.rglob("*.bin")} == before
    write(hub / "data/train-00001-of-00002.parquet", [0, 1], 50)
    got = read(Parquet(str(hub), unpacked), unpacked)
    assert [data for item, data in got if "00001-of" in item.key] == [encode(50), encode(51)]
    changed = [path.name for path in before if path.stat().st_mtime_ns != before[path]]
    assert len(changed) == 1
    assert changed[0].startswith("train-00001-of-00002-")


def open_and_list(url, unpacked, queue):
    queue.put([tuple(item) for item in Parquet(url, unpacked).items()])


def test_several_processes_unpack_at_once(tmp_path):
    for number in range(6):
        write(tmp_path / f"hub/train-{number:05d}-of-00006.parquet", [number % 3] * 40, number * 100)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [
        context.Process(target=open_and_list, args=(str(tmp_path / "hub"), tmp_path / "u", queue)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    lists = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert lists[0] == lists[1] == lists[2] == lists[3]
    source = Parquet(str(tmp_path / "hub"), tmp_path / "u")
    assert [data for _, data in read(source, tmp_path / "u")] == [
        encode(f * 100 + n) for f in range(6) for n in range(40)
    ]
    assert not [name for name in tree(tmp_path / "u") if name.endswith(".partial")]


def test_killed_at_any_rename(hub, tmp_path):
    list(Parquet(str(hub), tmp_path / "whole").items())
    whole = {name: data for name, data in tree(tmp_path / "whole").items() if name.endswith((".bin", ".parquet"))}
    for kill_at in range(1, 9):
        pid = os.fork()
        if not pid:
            replace, renames = os.replace, []

            def die(old, new, replace=replace, renames=renames, kill_at=kill_at):
                renames.append(new)
                if len(renames) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(old, new)

            os.replace = die
            list(Parquet(str(hub), tmp_path / f"u{kill_at}").items())
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert any(name.endswith(".partial") for name in tree(tmp_path / f"u{kill_at}"))
        list(Parquet(str(hub), tmp_path / f"u{kill_at}").items())
        after = tree(tmp_path / f"u{kill_at}")
        assert {name: data for name, data in after.items() if not name.endswith(".lock")} == whole


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    path = write(tmp_path / "x.parquet", [0] * 400)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    source = Parquet(str(path), tmp_path / "u")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            list(source.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(name.endswith(".lock") for name in tree(tmp_path / "u"))
    assert len(list(source.items())) == 400


def test_bad_files(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"x\.parquet is no Parquet file"):
        open_source(tmp_path / "x.parquet", unpacked=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no Parquet files"):
        open_source(tmp_path / "none", "parquet", unpacked=tmp_path)
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed/a.parquet", [0])
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "mixed/b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has no column label, as a\.parquet has"):
        open_source(tmp_path / "mixed", unpacked=tmp_path)
    write(tmp_path / "y.parquet", [0, 5])
    with pytest.raises(UserError, match="label 5 is beyond the 3 classes"):
        open_source(tmp_path / "y.parquet", unpacked=tmp_path)
    path = write(tmp_path / "z.parquet", [0] * 400)
    data = bytearray(path.read_bytes())
    data[5000:60000] = b"\0" * 55000
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"z\.parquet is damaged") as caught:
        list(open_source(path, unpacked=tmp_path / "u").items())
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "u").glob("*.bin"))
