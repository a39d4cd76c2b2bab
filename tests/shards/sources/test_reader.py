"""Reading items in order, from disk, S3 and the web, and what is missing or has changed."""

import pickle
import time

import pytest

from shards.errors import PatchmillError, UserError
from shards.header import BrokenImageError
from shards.sources import Item
from shards.sources import reader as reader_module
from shards.sources.reader import Reader
from tests.shards.sources.servers import answering, serve, upload


@pytest.fixture
def folder(tmp_path):
    for number in range(100):
        (tmp_path / f"a b {number}.bin").write_bytes(b"%d " % number * 50)
    return tmp_path


def item(file, offset=0, size=-1):
    return Item("key", str(file), offset, size, (0,))


def expected(number, offset=0, size=None):
    return (b"%d " % number * 50)[offset:][:size]


@pytest.mark.parametrize("where", ["disk", "s3", "web"])
def test_wholes_and_ranges_come_in_order(folder, where, request):
    root = str(folder)
    if where == "s3":
        root = upload(folder, request.getfixturevalue("s3"))
    with serve(folder) as url:
        reader = pickle.loads(pickle.dumps(Reader(url if where == "web" else root, folder / "unpacked")))
        items = [item(f"a b {number}.bin") for number in range(100)]
        items += [item(f"a b {number}.bin", 3, 7) for number in range(100)]
        got = list(reader.read_all(iter(items)))
        assert [each for each, _ in got] == items
        assert [data for _, data in got[:100]] == [expected(number) for number in range(100)]
        assert [data for _, data in got[100:]] == [expected(number, 3, 7) for number in range(100)]


def test_each_kind_of_file_name(folder, s3):
    (folder / "unpacked").mkdir()
    (folder / "unpacked/x.bin").write_bytes(b"0123456789")
    (folder / "a?b&c.bin").write_bytes(b"odd")
    upload(folder, f"{s3}/p")
    with serve(folder) as url:
        reader = Reader(str(folder), folder / "unpacked")
        for file, data in {
            "a b 7.bin": expected(7),
            "./a b 7.bin": expected(7),
            f"{folder}/a b 7.bin": expected(7),
            (folder / "a b 7.bin").as_uri(): expected(7),
            f"{s3}/p/a b 7.bin": expected(7),
            f"{url}/a%20b%207.bin": expected(7),
            f"{url}/a%20b%207.bin?width=5&x=a/b": expected(7),
            f"{url}/a%3Fb%26c.bin": b"odd",
            f"{url}/./unpacked/../a%20b%207.bin": expected(7),
        }.items():
            assert reader.read(item(file)) == data, file
        assert reader.read(item("@/x.bin", 0, 4)) == b"0123"
        assert reader.read(item("@/x.bin", 4, 6)) == b"456789"
        assert reader.read(item("@/x.bin", 4, 0)) == b""


def test_what_is_missing_takes_its_turn(folder, s3):
    upload(folder, s3)
    with serve(folder) as url:
        reader = Reader(str(folder), folder)
        files = [f"{s3}/a b 1.bin", f"{s3}/none", f"{url}/none", "none", "../none", "a b 2.bin", ".", f"{s3}/../x"]
        got = [data for _, data in reader.read_all(map(item, files))]
    assert [str(data) == "missing" for data in got] == [False, True, True, True, True, False, True, True]
    assert got[0] == expected(1)
    assert got[5] == expected(2)


def test_a_file_that_changed_or_went_away_is_an_error(folder):
    reader = Reader(str(folder), folder)
    with pytest.raises(UserError, match=r"a b 1\.bin .* changed while the build ran"):
        reader.read(item("a b 1.bin", 0, 99))
    with pytest.raises(UserError, match=r"cannot read gone\.bin .*: No such file"):
        reader.read(item("gone.bin", 0, 99))
    with pytest.raises(UserError, match="ends before byte"):
        reader.read(item("a b 1.bin", 50, 999))


def test_a_dead_server_is_an_error_not_a_missing_image(monkeypatch):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "0")
    reader_module._store.cache_clear()
    for url in ("http://127.0.0.1:9/x.jpg", "https://127.0.0.1:9/x.jpg"):
        with pytest.raises(PatchmillError, match="cannot read"):
            list(Reader("/", "/").read_all([item(url)]))
    with answering() as url:
        for status in (500, 503, 408, 429):
            with pytest.raises(PatchmillError, match=f"{status} "):
                list(Reader("/", "/").read_all([item(f"{url}/{status}")]))
    reader_module._store.cache_clear()


def test_a_url_that_is_refused_for_good_takes_its_turn(monkeypatch):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "0.3")
    reader_module._store.cache_clear()
    with answering() as url:
        files = {
            f"{url}/200": "a body",
            **{f"{url}/{status}": str(status) for status in (400, 401, 403, 410, 418, 451)},
            f"{url}/403?x=1": "403 Forbidden",
            f"{url}/404": "missing",
            f"{url}/301": "redirected to nowhere",
            f"{url}/loop": "redirected for ever",
            "http://no-such-host.invalid/x.jpg": "unknown host",
            "http://a..b/x.jpg": "unknown host",
            "http://[::1/x.jpg": "no URL that can be opened",
            "ftp://localhost/x.jpg": "no URL that can be opened",
            "http://user:hunter2@localhost/x.jpg": "no URL that can be opened",
            "http://hunter2@localhost/x.jpg?width=5": "no URL that can be opened",
        }
        got = list(Reader("/", "/").read_all(map(item, files)))
        assert [each.file for each, _ in got] == list(files)
        for (each, data), reason in zip(got, files.values(), strict=True):
            assert isinstance(data, BrokenImageError) == (each.file != f"{url}/200")
            assert reason in str(data), each.file
            assert "hunter2" not in str(data)
        (_, relative), (_, whole) = Reader(url, "/").read_all([item("410"), item("200")])
        assert str(relative) == "410 Gone"
        assert whole == b"a body"
        with pytest.raises(PatchmillError):  # what a source has seen must not go
            Reader(url, "/").read(item("410", 0, 6))
    reader_module._store.cache_clear()


def test_bodies_without_length(monkeypatch):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "1")
    with answering() as url:
        read = Reader("/", "/").read
        assert read(item(f"{url}/chunked")) == b"a body"
        assert read(item(f"{url}/chunked?a b=ü/ü")) == b"a body"
        assert read(item(f"{url}/a b/ü/chunked")) == b"a body"
        assert read(item(f"{url}/close")) == b"a body"
        assert read(item(f"{url}/cut twice")) == b"a body"
        with pytest.raises(PatchmillError, match="cannot read"):
            read(item(f"{url}/cut"))


def test_reads_ahead(folder, monkeypatch):
    read = Reader.read

    def slow(self, item):
        time.sleep(0.05)
        return read(self, item)

    monkeypatch.setattr(Reader, "read", slow)
    with serve(folder) as url:
        start = time.monotonic()
        got = list(Reader(url, folder).read_all(item(f"a b {number}.bin") for number in range(64)))
    assert [data for _, data in got] == [expected(number) for number in range(64)]
    assert time.monotonic() - start < 64 * 0.05 / 3
