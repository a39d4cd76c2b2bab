"""Indexes that are made again: after a kill, a full disk, or a change of the tars."""

import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest

from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.index import index
from tests.shards.foreign import samples, write_named, write_webdataset
from tests.shards.images import tree


def test_workers_make_no_difference_and_what_is_done_is_kept(tmp_path):
    folder = write_named(tmp_path / "set", ["zebra", "cat"], ["ant", "zebra"], ["cat"], ["bee"])
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
    folder = write_named(tmp_path / "set", ["zebra", "cat"], ["ant", "zebra"])
    index(folder)
    write_named(tmp_path / "new", [], [], ["bee"])
    shutil.copy(tmp_path / "new" / "2.tar", folder)
    made = index(folder)
    assert (made.read, made.classes) == (1, ["ant", "bee", "cat", "zebra"])
    assert [s.labels for s in samples(folder)] == [(3,), (2,), (0,), (3,), (1,)]
    write_named(tmp_path / "new", ["cow", "cat"])
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
    write_named(tmp_path / "new", [], ["ant", "eland"])  # the same headers, another label
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
    folder = write_named(tmp_path / "set", ["zebra", "cat"])
    index(folder)
    write_exclude(folder, "v1", [(0, 1, "a duplicate")])
    assert index(folder).read == 0
    write_named(folder, ["zebra", "cat"], ["ant"])
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


@pytest.mark.long
def test_names_of_classes_are_in_memory_once_not_once_a_tar(tmp_path):
    write_named(tmp_path, [f"{number:02d} {'x' * 5000}" for number in range(20)])
    for number in range(1, 150):
        shutil.copy(tmp_path / "0.tar", tmp_path / f"{number}.tar")
    index(tmp_path, workers=1)
    tracemalloc.start()
    try:
        made = index(tmp_path, workers=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(made.classes), made.read) == (20, 0)
    assert peak < 7 << 20  # the names of all tars together are 15 MB
