"""Data that several tests of this folder read, and never change."""

import pytest

from shards.build import build
from tests.shards.images import make_source
from tests.shards.sources.servers import serve


@pytest.fixture(scope="session")
def ninety(tmp_path_factory):
    """A data set of 90 noise images in three classes: six shards of 13, one of 12."""
    source = make_source(tmp_path_factory.mktemp("source"), classes=3, each=30)
    folder = tmp_path_factory.mktemp("ninety")
    build(source, folder, shard_samples=13, workers=1)
    return folder


@pytest.fixture(scope="session")
def ninety_url(ninety):
    """The same on a web server."""
    with serve(ninety) as url:
        yield url
