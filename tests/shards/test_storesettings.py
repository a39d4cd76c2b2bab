"""How remote stores are reached: what settings, environment and profiles say is what a real server sees."""

import re
import time
from datetime import timedelta

import numpy as np
import pytest

from shards import awsprofile
from shards.chunks import ChunkReader
from shards.dataset import Dataset
from shards.errors import PatchmillError, UserError
from shards.order import Order, Shuffle
from shards.sources import Item
from shards.sources.reader import Reader
from shards.store import open_store
from shards.storesettings import StoreSettings
from shards.tarstream import find_streams
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.foreign import write_tar
from tests.shards.servers import serve_faults

SECRET = "hunter2hunter2"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """What looks like S3 to who only reads; in the environment there are keys and no address."""
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ENVIRONMENT")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    (tmp_path / "site/bucket").mkdir(parents=True)
    (tmp_path / "site/bucket/x").write_bytes(b"content")
    with serve_faults(tmp_path / "site") as server:
        yield server


def signed_as(server, **settings):
    """Return the key and the region that a request was signed with, or None if it was not."""
    assert open_store("s3://bucket", settings=StoreSettings(**settings)).read("x") == b"content"
    assert server.paths[-1] == "/bucket/x"
    found = re.search(r"Credential=([^/]*)/\d*/([^/]*)/", server.authorizations[-1] or "")
    return found and found.groups()


def test_endpoint_region_and_anonymous_are_what_the_server_sees(server):
    assert signed_as(server, endpoint=server.url) == ("ENVIRONMENT", "us-east-1")
    assert signed_as(server, endpoint=f"{server.url}/", region="eu-test-1") == ("ENVIRONMENT", "eu-test-1")
    assert signed_as(server, endpoint=server.url, anonymous=True) is None


def test_streams_of_tars_have_settings_too(server, tmp_path):
    write_tar(tmp_path / "site/bucket/0.tar", [("a.jpg", b"image")])
    (tar,) = find_streams("s3://bucket/{0..0}.tar", False, StoreSettings(endpoint=server.url, region="eu-test-1"))
    with tar.open() as stream:
        assert stream.read() == (tmp_path / "site/bucket/0.tar").read_bytes()
    assert "/eu-test-1/" in server.authorizations[-1]


@pytest.mark.parametrize("url", ["gs://bucket", "az://bucket"])
def test_endpoint_and_anonymous_of_other_clouds(server, url, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    settings = StoreSettings(endpoint=server.url, anonymous=True)
    assert open_store(url, settings=settings).read("x") == b"content"
    assert server.paths[-1] == "/bucket/x"


def test_the_environment_gives_what_the_settings_leave_open(server, monkeypatch):
    monkeypatch.setenv("PATCHMILL_STORE_ENDPOINT", server.url)
    monkeypatch.setenv("PATCHMILL_STORE_REGION", "eu-test-1")
    assert signed_as(server) == ("ENVIRONMENT", "eu-test-1")
    assert signed_as(server, region="eu-test-2") == ("ENVIRONMENT", "eu-test-2")
    monkeypatch.setenv("PATCHMILL_STORE_ANONYMOUS", "true")
    assert signed_as(server) is None
    assert open_store("s3://bucket").read("x") == b"content"
    assert signed_as(server, anonymous=False) == ("ENVIRONMENT", "eu-test-1")


def test_a_profile_gives_keys_region_and_endpoint(server, tmp_path, monkeypatch):
    (tmp_path / "config").write_text(
        f"[default]\nregion = x\n[profile there]\nregion = eu-test-3\nendpoint_url = {server.url}\ns3 =\n  a = b\n"
        "[profile elsewhere]\nsso_start_url = https://example.org\n"
    )
    (tmp_path / "credentials").write_text(
        f"[there]\naws_access_key_id = PROFILE\naws_secret_access_key = {SECRET}%\n"
        f"[default]\naws_access_key_id = DEFAULT\naws_secret_access_key = {SECRET}\n"
    )
    assert signed_as(server, profile="there") == ("PROFILE", "eu-test-3")
    assert signed_as(server, profile="there", region="eu-test-4") == ("PROFILE", "eu-test-4")
    assert signed_as(server, profile="default", endpoint=server.url) == ("DEFAULT", "x")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert signed_as(server, profile="there") == ("PROFILE", "eu-test-3")
    with pytest.raises(UserError, match=r"no profile nobody in .*; there are: default, elsewhere, there$"):
        signed_as(server, profile="nobody")
    with pytest.raises(UserError, match=r"profile elsewhere holds no keys .*export-credentials --profile elsewhere"):
        signed_as(server, profile="elsewhere")
    (tmp_path / "credentials").write_text(f"aws_secret_access_key = {SECRET}\n")
    with pytest.raises(UserError, match=r"cannot read .*credentials: it is no file of the AWS") as caught:
        signed_as(server, profile="there")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_keys_of_a_profile_may_be_renewed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(awsprofile, "LIFE", timedelta(0))
    keys = "[work]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    (tmp_path / "credentials").write_text(keys.format("FIRST"))
    store = open_store("s3://bucket", settings=StoreSettings(endpoint=server.url, profile="work"))
    store.read("x")
    (tmp_path / "credentials").write_text(keys.format("SECOND"))
    store.read("x")
    assert [re.search(r"Credential=(\w+)", header)[1] for header in server.authorizations] == ["FIRST", "SECOND"]


def test_keys_that_a_request_cannot_hold_are_told(server, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{SECRET}\n")
    with pytest.raises(UserError, match=r"variable AWS_SESSION_TOKEN holds a line break") as caught:
        signed_as(server, endpoint=server.url)
    assert SECRET not in str(caught.value)


def test_an_address_that_would_not_count_is_told(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=rf"AWS_ENDPOINT_URL_S3 .* would go before endpoint {server.url}; unset one"):
        signed_as(server, endpoint=server.url)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CONCURRENCY", "0", r"PATCHMILL_STORE_CONCURRENCY=0 does not fit: .* greater than 0"),
        ("TIMEOUT_SECONDS", "soon", r"PATCHMILL_STORE_TIMEOUT_SECONDS=soon does not fit: .* number"),
        ("ENDPOINT", "s3.example.org", r"PATCHMILL_STORE_ENDPOINT=s3.example.org does not fit: give the URL"),
        ("ENDPOINT", f"https://me:{SECRET}@example.org", "the URL of example.org carries a password"),
        ("ENDPOINT", f"https://me:1/{SECRET}@example.org", "carries a user or a query"),
        ("ENDPOINT", f"https://{SECRET}@example.org", "carries a user or a query"),
        ("ENDPOINT", f"https://example.org?token={SECRET}", "carries a user or a query"),
    ],
)
def test_variables_that_do_not_fit_are_told(monkeypatch, name, value, message):
    monkeypatch.setenv(f"PATCHMILL_STORE_{name}", value)
    with pytest.raises(UserError, match=message) as caught:
        StoreSettings()
    assert SECRET not in str(caught.value)


def test_settings_that_contradict_are_told(monkeypatch):
    with pytest.raises(UserError, match="anonymous access to stores has no use for profile 'x'; unset one"):
        StoreSettings(anonymous=True, profile="x")
    monkeypatch.setenv("PATCHMILL_STORE_PROFILE", "x")
    with pytest.raises(UserError, match="anonymous access to stores has no use for profile 'x'; unset one"):
        StoreSettings(anonymous=True)
    monkeypatch.setenv("PATCHMILL_STORE_ANONYMOUS", "true")
    assert StoreSettings(anonymous=False).profile == "x"


def test_no_more_requests_than_asked_for_are_in_flight(tmp_path, monkeypatch):
    write_dataset(tmp_path, ["a"], [[Made(f"{s}-{i}", plain("red")) for i in range(8)] for s in range(4)])
    with serve_faults(tmp_path) as server:
        dataset = Dataset.open(server.url, settings=StoreSettings(concurrency=3))
        for shard in range(4):
            dataset.rows(shard)
        server.seconds, server.most = 0.05, 0
        order = Order(dataset.shard_sizes, 0, Shuffle(lanes=2, chunk=2, block=2))
        chunks = ChunkReader(dataset, order)
        chunks.ahead(np.arange(32))
        for _, shard, index in zip(*order.locate(np.arange(32)), strict=True):
            chunks.read(int(shard), int(index))
        chunks.close()
        assert server.most == 3

        monkeypatch.setenv("PATCHMILL_STORE_CONCURRENCY", "2")
        server.most = 0
        items = [Item("key", f"{server.url}/manifest/dataset.json?{i}", 0, -1, ()) for i in range(8)]
        assert len(list(Reader("/", tmp_path).read_all(items))) == 8
        assert server.most == 2


def test_silence_is_an_error_after_the_time_set(server, tmp_path):
    server.fault, server.bad = "silence", 99
    settings = StoreSettings(endpoint=server.url, timeout_seconds=1, retry_seconds=0)
    began = time.monotonic()
    with pytest.raises(PatchmillError, match=r"cannot read s3://bucket/x, bytes 0 to 5"):
        open_store("s3://bucket", settings=settings).read_range("x", 0, 5)
    assert 1 <= time.monotonic() - began < 5
    assert server.requests == 1
