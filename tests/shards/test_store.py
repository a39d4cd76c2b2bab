"""Range reads: the same calls, locally and over HTTP, and the errors they give."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from shards import store as store_module
from shards.errors import PatchmillError, UserError
from shards.store import MissingError, open_store

CONTENT = np.random.default_rng(0).bytes(300_000)


class RangeHandler(SimpleHTTPRequestHandler):
    """The standard file server, plus byte ranges; the server's first ``failures`` answers are 503."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.server.failures > 0:
            self.server.failures -= 1
            return self.send_error(503)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not found:
            return super().do_GET()
        start, stop = int(found[1]), int(found[2]) + 1
        try:
            with open(self.translate_path(self.path), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            return self.send_error(404)
        part = data[start:stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "000000.tar").write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def server(folder):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=folder)) as server:
        server.failures = 0
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(params=["path", "file URL", "http"])
def store(request, folder):
    if request.param == "http":
        server = request.getfixturevalue("server")
        return open_store(f"http://127.0.0.1:{server.server_port}")
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
    monkeypatch.setattr(store_module, "OPEN_FILES", 2)  # so that descriptors are closed under the readers
    for i in range(5):
        (folder / f"{i}.bin").write_bytes(bytes([i]) * 10_000)
    store = open_store(folder)
    with ThreadPoolExecutor(8) as pool:
        reads = list(pool.map(lambda n: store.read_range(f"{n % 5}.bin", n, 50), range(2000)))
    assert all(data == bytes([n % 5]) * 50 for n, data in enumerate(reads))


def test_server_errors_are_tried_again(server):
    server.failures = 2
    store = open_store(f"http://127.0.0.1:{server.server_port}/shards")
    assert store.read_range("000000.tar", 10, 10) == CONTENT[10:20]
    assert server.failures == 0


def test_network_fault_names_url_and_range(monkeypatch, server):
    monkeypatch.setattr(store_module, "RETRY", {"max_retries": 0})
    server.failures = 1
    with pytest.raises(PatchmillError, match=r"cannot read http.*x\.tar, bytes 3 to 7: .*503") as caught:
        open_store(f"http://127.0.0.1:{server.server_port}").read_range("x.tar", 3, 4)
    assert "\n" not in str(caught.value)


def test_lists_names(folder):
    (folder / "shards" / "a.tar").write_bytes(b"")
    assert open_store(folder).list("shards") == ["000000.tar", "a.tar"]
    assert open_store(folder).list("nothing") == []


@pytest.mark.parametrize("url", ["{}/missing", "file://{}/missing", "foo://bar/baz"])
def test_bad_urls(url, tmp_path):
    with pytest.raises(UserError, match="check the"):
        open_store(url.format(tmp_path))


def test_password_in_url_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="environment") as caught:
        open_store("https://me:hunter2@example.org/data")
    assert "hunter2" not in str(caught.value)
