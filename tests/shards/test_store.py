"""The same calls, locally, over HTTP and on S3, and the errors they give."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from shards import localstore
from shards.errors import PatchmillError, UserError
from shards.objects import ExistsError, MissingError
from shards.remotestore import GAP, _spans
from shards.store import open_store
from shards.storesettings import StoreSettings
from shards.temporary import temporary_folder
from tests.shards.servers import serve_faults

CONTENT = np.random.default_rng(0).bytes(300_000)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "000000.tar").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def server(folder):
    with serve_faults(folder) as server:
        yield server


@pytest.fixture(params=["path", "file URL", "http", "s3"])
def store(request, folder):
    if request.param == "s3":
        store = open_store(f"{request.getfixturevalue('s3')}/a/prefix")
        store.write("shards/000000.tar", CONTENT)
        return store
    if request.param == "http":
        server = request.getfixturevalue("server")
        return open_store(server.url)
    return open_store(folder if request.param == "path" else folder.as_uri())


def test_reads_whole_objects_and_ranges(store):
    assert store.read("shards/000000.tar") == CONTENT
    assert store.read_range("shards/000000.tar", 1000, 5000) == CONTENT[1000:6000]
    starts, lengths = [250_000, 0, 7], [50_000, 1, 100]
    expected = [CONTENT[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert store.read_ranges("shards/000000.tar", starts, lengths) == expected


def test_exists(store):
    assert store.exists("shards/000000.tar")
    assert not store.exists("shards/000001.tar")


def test_missing_object_names_url_and_range(store):
    with pytest.raises(MissingError, match=r"shards/9\.tar, bytes 5 to 12"):
        store.read_range("shards/9.tar", 5, 7)
    with pytest.raises(MissingError, match=re.escape(store.url)):
        store.read("manifest/dataset.json")


def test_a_cut_object_is_an_error(store):
    with pytest.raises(PatchmillError, match=r"shards/000000\.tar.*(300010|cut short)"):
        store.read_range("shards/000000.tar", 299_990, 20)


def test_many_threads_share_a_store_with_few_descriptors(folder, monkeypatch):
    monkeypatch.setattr(localstore, "OPEN_FILES", 2)  # so that descriptors are closed under the readers
    for i in range(5):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * 10_000)
    store = open_store(folder)
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda n: store.read_range(f"{n % 5}.bin", n, 50), range(2000)))
    assert all(data == bytes([n % 5]) * 50 for n, data in enumerate(reads))


READS = {
    "whole": lambda store: store.read("000000.tar") == CONTENT,
    "range": lambda store: store.read_range("000000.tar", 10, 5000) == CONTENT[10:5010],
    "ranges": lambda store: (
        store.read_ranges("000000.tar", [9000, 10], [100, 50]) == [CONTENT[9000:9100], CONTENT[10:60]]
    ),
    "stream": lambda store: store.stream("000000.tar").read() == CONTENT,
}


FAULTS = ("error", "reset", "silence", "half body", "reset inside", "stall", "wrong length")


@pytest.mark.parametrize(
    ("fault", "read"),
    [
        pytest.param(fault, read, id=f"{fault}-{name}")
        for fault in FAULTS
        for name, read in READS.items()
        if (fault, name) != ("wrong length", "whole")  # only of a range is it known how long it should be
    ],
)
def test_bad_answers_are_asked_for_again_and_counted(server, fault, read):
    server.fault, server.bad = fault, 2
    store = open_store(f"{server.url}/shards", settings=StoreSettings(timeout_seconds=0.5))
    assert read(store)
    assert server.requests == 3
    assert store.retries == 2


@pytest.mark.parametrize(
    ("fault", "message", "read"),
    [
        (fault, message, read)
        for fault, message in [
            ("error", "500 Internal"),
            ("half body", "response body"),
            ("short range", "Requested .* got"),
        ]
        for name, read in READS.items()
        if (fault, name) != ("short range", "whole")  # which asks for no range
    ],
)
def test_a_server_that_stays_bad_is_an_error_in_one_line(monkeypatch, server, fault, message, read):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "0.3")
    server.fault, server.bad = fault, 99
    with pytest.raises(PatchmillError, match=rf"http.*000000\.tar.*{message}") as caught:
        read(open_store(f"{server.url}/shards"))
    assert "\n" not in str(caught.value)
    assert server.requests == 1 if fault == "short range" else server.requests > 1


def test_network_fault_names_url_and_range(monkeypatch, server):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "0")
    server.fault, server.bad = "error", 1
    with pytest.raises(PatchmillError, match=r"cannot read http.*x\.tar, bytes 3 to 7: .*500") as caught:
        open_store(server.url).read_range("x.tar", 3, 4)
    assert "\n" not in str(caught.value)


def test_near_ranges_share_a_request(server):
    store = open_store(f"{server.url}/shards")
    starts, lengths = [5000, 100, 120, 100, 299_999], [10, 50, 10, 5, 1]
    found = store.read_ranges("000000.tar", starts, lengths)
    assert found == [CONTENT[s : s + n] for s, n in zip(starts, lengths, strict=True)]
    assert server.requests == 1


def test_spans_merge_what_is_near():
    gap = GAP
    assert _spans([(10, 5), (0, 20), (20 + gap, 1), (22 + 2 * gap, 3)]) == [
        (0, 21 + gap),
        (22 + 2 * gap, 25 + 2 * gap),
    ]


@pytest.fixture
def plain_server(folder):
    """The standard file server, which knows no ranges."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/shards"
        server.shutdown()


def test_a_plain_server_lists_nothing(plain_server):
    with pytest.raises(PatchmillError, match=r"plain web servers such as .* cannot list"):
        open_store(plain_server).list("")


@pytest.fixture(params=["path", "s3"])
def empty(request, tmp_path):
    return open_store(tmp_path / "x" if request.param == "path" else f"{request.getfixturevalue('s3')}/x", create=True)


def test_what_is_written_is_there(empty):
    large = np.random.default_rng(1).bytes(12 << 20)  # above the size from which S3 gets it in parts
    before = time.time_ns() - 2_000_000_000  # S3 tells whole seconds
    with empty.new_file("a/b/large.bin") as file:
        file.write_bytes(large)
    assert (empty.size("a/b/large.bin"), empty.read_range("a/b/large.bin", 6 << 20, 9)) == (
        12 << 20,
        large[6 << 20 :][:9],
    )
    assert before < empty.modified("a/b/large.bin") < time.time_ns() + 2_000_000_000
    with empty.stream("a/b/large.bin") as stream:
        assert stream.read(100) == large[:100]
        stream.seek(9 << 20)
        assert stream.read() == large[9 << 20 :]
    for path in ("a/small", "a/ü %20 b.txt", "top"):
        empty.write(path, b"1")
        empty.write(path, b"22")
        assert empty.read(path) == b"22"
    assert empty.list("") == ["top"]
    assert empty.list("a") == ["small", "ü %20 b.txt"]
    assert empty.list("a", below=True) == ["b/large.bin", "small", "ü %20 b.txt"]
    assert empty.list("", below=True) == ["a/b/large.bin", "a/small", "a/ü %20 b.txt", "top"]
    assert empty.folders() == ["a"]
    assert empty.list("nothing") == empty.list("nothing", below=True) == []
    empty.delete("a/small")
    empty.delete("a/small")
    assert not empty.exists("a/small")


def test_a_failed_write_leaves_the_old_object_and_nothing_else(empty):
    empty.write("x", b"old")

    def fail():
        with empty.new_file("x") as file:
            file.write_bytes(b"half of the n")
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        fail()
    assert empty.read("x") == b"old"
    assert empty.list("", below=True) == ["x"]


def test_of_many_who_create_one_object_one_succeeds(empty):
    def attempt(number):
        try:
            empty.create("v/1", b"%d" % number)
        except ExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        won = [number for number in pool.map(attempt, range(20)) if number is not None]
    assert [b"%d" % number for number in won] == [empty.read("v/1")]
    assert empty.list("", below=True) == ["v/1"]
    with pytest.raises(ExistsError, match="v/1 exists"):
        empty.create("v/1", b"again")


def test_s3_takes_all_from_the_environment(s3, s3_server, monkeypatch):
    open_store(f"{s3}/data").write("private", b"1")
    url = f"{s3_server}/{s3.removeprefix('s3://')}/data/public"
    request = urllib.request.Request(url, b"2", {"x-amz-acl": "public-read", "Content-Type": "x/y"}, method="PUT")
    urllib.request.urlopen(request, timeout=10)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    anonymous = open_store(f"{s3}/data")
    assert anonymous.read("public") == b"2"
    with pytest.raises(PatchmillError, match="check the credentials in the environment") as caught:
        anonymous.read("private")
    assert "\n" not in str(caught.value)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(PatchmillError, match="AWS_ALLOW_HTTP=true"):
        open_store(f"{s3}/data").read("public")


def test_no_bucket_is_an_error_in_one_line(s3):
    store = open_store("s3://no-such-bucket/x")
    for call in (store.folders, lambda: store.list(""), lambda: store.write("a", b"1"), lambda: store.read("../a")):
        with pytest.raises(PatchmillError, match="no-such-bucket") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_lists_names(folder):
    (folder / "shards" / "a.tar").write_bytes(b"")
    assert open_store(folder).list("shards") == ["000000.tar", "a.tar"]
    assert open_store(folder).list("nothing") == []


@pytest.mark.parametrize("url", ["{}/missing", "file://{}/missing", "foo://bar/baz"])
def test_bad_urls(url, tmp_path):
    with pytest.raises(UserError, match="check the"):
        open_store(url.format(tmp_path))


def test_what_is_no_url_is_one_line_without_what_may_be_a_secret():
    for url in ("http://[::1", "s3://[bucket/data", "file://[data"):
        with pytest.raises(UserError, match=rf"'{re.escape(url)}' cannot be read .*; check its host"):
            open_store(url)
    for url in ("https://me:hunter2@[::1/data", "https://me:[hunter2]@host/data", "https://me:hunter2／@host/data"):
        with pytest.raises(UserError, match="a URL cannot be read; check its host"):
            open_store(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@example.org/data",
        "s3://me:hunter2/+hunter2@bucket/data",
        "https://hunter2@example.org/data",
        "s3://hunter2@bucket/data",
        "https://example.org/data?sig=hunter2",
        "https://account.blob.core.windows.net/data/set?sv=2024&sig=hunter2",
    ],
)
def test_secrets_in_url_are_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="environment") as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_uploads_of_killed_processes_are_cleared(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, signal
from shards.store import open_store
with open_store(os.environ["BUCKET"]).new_file("x") as path:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"BUCKET": s3, "TMPDIR": str(tmp_path), "PYTHONPATH": root}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    os.utime(left, (0, 0))
    with open_store(s3).new_file("x") as path:
        path.write_bytes(b"whole")
        assert not left.exists()
        os.utime(path.parent, (0, 0))
        open_store(s3).write("y", b"meanwhile")  # whose clearing leaves the open one alone
        assert path.exists()
    assert open_store(s3).read("x") == b"whole"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_cleared_takes_no_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    os.utime(tmp_path / "elsewhere", (0, 0))
    (tmp_path / "patchmill-store-link").symlink_to("elsewhere")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with temporary_folder():
            pass
    assert len(os.listdir("/proc/self/fd")) <= before  # what other tests left may be closed meanwhile
