"""Fixtures that several tests share."""

import itertools
import os
import signal
import urllib.request

import hypothesis
import pytest
from moto.server import ThreadedMotoServer

# Whoever started the tests, as nohup or as a job in the background: Ctrl-C and a closed terminal end what they start,
# which has no handler of this process. The tests themselves outlive a closed terminal if they were to.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

hypothesis.settings.register_profile("shared machines", deadline=None)
hypothesis.settings.load_profile("shared machines")

_numbers = itertools.count()
_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="session")
def _group():
    """One process group of this process alone for all tests: DeepSpeed keeps the first that it meets."""
    from pipeline import distributed  # which takes seconds, and most tests of shards do without

    before = {name: os.environ.pop(name, None) for name in _RANK}
    distributed.start()
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    yield
    distributed.finish()


@pytest.fixture
def alone(monkeypatch, _group):
    """A process group of this process alone."""
    for name in _RANK:
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def s3_server():
    """A real S3 server, moto's, on a free port; yields its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The URL of an empty bucket; the environment says where it is and holds the keys."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_numbers)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT"), timeout=10)
    return f"s3://{bucket}"
