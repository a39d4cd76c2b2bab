"""The shuffle window of remote shards, checked before a run starts: over HTTP, beside what memory seems to be free."""

import pytest

from pipeline import shuffleroom
from pipeline.datasettings import DataSettings
from pipeline.shuffleroom import EDGES, check_window
from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from tests.shards.images import make_source
from tests.shards.servers import serve_faults


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    build(make_source(folder / "source", classes=2, each=20), folder / "set", shard_samples=8, workers=1)
    with serve_faults(folder / "set") as server:
        yield str(folder / "set"), server.url


def test_a_window_that_does_not_fit(alone, sets, tmp_path, monkeypatch):
    local, remote = sets
    settings = DataSettings(train=remote, window_bytes=16_000_000)
    dataset = Dataset.open(remote)
    shuffle = dataset.order(0, settings.window_bytes).shuffle
    wanted = EDGES * shuffle.window * dataset.mean_bytes  # of one rank, which holds all
    assert 0 < wanted <= EDGES * settings.window_bytes

    monkeypatch.setattr(shuffleroom, "free_memory", lambda: wanted)
    check_window(dataset, settings, seed=0)
    monkeypatch.setattr(shuffleroom, "free_memory", lambda: wanted - 1)
    with pytest.raises(UserError, match=r"shuffle window of 0.0 GB takes 0.0 GB .* make data.window_bytes smaller, or"):
        check_window(dataset, settings, seed=0)
    check_window(Dataset.open(local), settings, seed=0)  # read from its files, chunk by chunk
    check_window(dataset, settings.model_copy(update={"cache": str(tmp_path), "cache_bytes": 10**9}), seed=0)
