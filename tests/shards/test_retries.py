"""Which faults are asked again; the answers are those of a real server, through obstore."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import obstore
import pytest
from obstore.exceptions import BaseError

from shards.retries import Retries
from tests.shards.servers import serve_faults
from tests.shards.sources.servers import answering


def reader(url):
    """Requests that obstore does not try again by itself."""
    options = {"allow_http": True, "timeout": timedelta(seconds=0.2)}
    store = obstore.store.from_url(
        url, client_options=options, retry_config={"max_retries": 0, "retry_timeout": timedelta(0)}
    )
    return lambda name: obstore.get(store, name).bytes().to_bytes()


@pytest.fixture(scope="module")
def url():
    with answering() as url:
        yield url


@pytest.mark.parametrize("answer", ["500", "502", "503", "504", "429", "408"])
def test_what_may_pass_is_asked_again_until_time_is_up(url, answer):
    began, retries = time.monotonic(), Retries(0.4)
    with pytest.raises(BaseError):
        retries(lambda: reader(url)(answer))
    assert 1 <= retries.count <= 3  # after pauses of 0.05 to 0.1, 0.1 to 0.2, and 0.2 to 0.4 seconds
    assert time.monotonic() - began < 5
    retries = Retries(0)
    with pytest.raises(BaseError):
        retries(lambda: reader(url)(answer))
    assert retries.count == 0


def test_nobody_there_is_asked_again():
    retries = Retries(0.4)
    with pytest.raises(BaseError, match="error sending request"):
        retries(lambda: reader("http://127.0.0.1:1")("x"))
    assert retries.count >= 1


@pytest.mark.parametrize("answer", ["400", "401", "403", "404", "410", "loop"])
def test_what_will_not_pass_is_raised_at_once(url, answer):
    retries = Retries(60)
    with pytest.raises((BaseError, FileNotFoundError)):
        retries(lambda: reader(url)(answer))
    assert retries.count == 0


def test_threads_count_together(tmp_path):
    (tmp_path / "x").write_bytes(b"here")
    retries = Retries(60)
    with serve_faults(tmp_path) as server, ThreadPoolExecutor(8) as pool:
        server.fault, server.bad = "error", 40
        read, asked = reader(server.url), []

        def ask() -> bytes:
            asked.append(1)  # also what a busy machine cut short on its way
            return read("x")

        assert list(pool.map(lambda _: retries(ask), range(64))) == [b"here"] * 64
    assert retries.count == len(asked) - 64 >= 40
