"""Servers that send no parts of files: each file is fetched whole, once, and read from the local disk."""

import gc
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shards.errors import PatchmillError
from shards.objects import MissingError, ShortError
from shards.store import open_store
from shards.storesettings import StoreSettings
from tests.shards.servers import serve_faults

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "site").mkdir()
    for name in ("0.tar", "1.tar"):
        (tmp_path / "site" / name).write_bytes(name.encode() + CONTENT)
    with serve_faults(tmp_path / "site") as server:
        server.ranges = False
        yield server


def test_many_readers_fetch_a_file_once(server, temporary, capfd):
    store = open_store(server.url)
    assert store.read_range("0.tar", 5, 3) == CONTENT[:3]
    paths = len(server.paths)
    server.seconds = 0.05
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda at: store.read_ranges("1.tar", [5 + at, 5], [50, 7]), range(0, 80_000, 1000))
        assert list(found) == [[CONTENT[at : at + 50], CONTENT[:7]] for at in range(0, 80_000, 1000)]
    assert server.paths[paths:] == ["/1.tar"]
    assert store.stream("1.tar").read() == b"1.tar" + CONTENT
    assert len(server.paths) == paths + 1
    warnings = capfd.readouterr().err
    assert warnings.startswith(f"warning: {server.url} sends no parts of files: each shard is fetched whole, by every")
    assert warnings.count("\n") == 1
    assert str(temporary) in warnings


def test_files_go_with_the_store(server, temporary):
    assert open_store(server.url).read_range("0.tar", 5, 3) == CONTENT[:3]
    gc.collect()
    assert not list(temporary.iterdir())


def test_broken_downloads_are_tried_again_and_then_told(server, temporary):
    store = open_store(server.url, settings=StoreSettings(retry_seconds=0.5))
    server.fault, server.good, server.bad = "half body", 1, 2
    assert store.read_range("0.tar", 5, 3) == CONTENT[:3]
    server.bad = 99
    with pytest.raises(PatchmillError, match=rf"cannot read {server.url}/1\.tar: .*it broke off.*check the network"):
        store.read_range("1.tar", 0, 5)
    assert len(list(temporary.glob("*/*"))) == 1  # nothing half-written


def test_what_is_missing_or_short_is_named(server, temporary):
    store = open_store(server.url)
    store.read_range("0.tar", 0, 1)
    with pytest.raises(MissingError, match=rf"no object {server.url}/2\.tar"):
        store.read_range("2.tar", 0, 1)
    with pytest.raises(ShortError, match=rf"{server.url}/0\.tar ends before byte 300010 \(asked for 10 from 300000\)"):
        store.read_range("0.tar", 300_000, 10)


def test_a_full_disk_is_told(server, tmp_path):
    program = (
        "import resource, sys; from shards.store import open_store; from shards.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: open_store(sys.argv[1]).read_range('0.tar', 0, 1)\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, server.url], capture_output=True, text=True, timeout=60, check=False,
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.stdout.startswith(f"no room for {server.url}/0.tar: {tmp_path}"), done.stderr
    assert "File too large; set TMPDIR to another disk" in done.stdout
    assert not list(tmp_path.glob("patchmill-*"))
