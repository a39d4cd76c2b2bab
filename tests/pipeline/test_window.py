import json
import time
from itertools import islice

import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.engines.fragments import Step
from pipeline.settings import check
from pipeline.window import Taken, Window
from shards.augment import InceptionCrop
from shards.build import build
from shards.cache import ChunkCache
from shards.dataset import Dataset
from shards.loader import Loader
from tests.shards.images import make_source
from tests.shards.servers import serve_faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("window")
    build(make_source(folder / "source", classes=2, each=20), folder / "set", shard_samples=13, workers=1)
    return folder / "set"


@pytest.fixture(scope="module")
def settings():
    table = {"duration": "1 step", "global_batch": 12, "data": {"train": "x", "threads": 3}, "model": {"name": "a"}}
    return check(TrainSettings, table, "test")


def test_a_window_measures_what_happened_in_it_alone(folder, settings, alone):
    loader = Loader(Dataset.open(folder), global_batch=12, transform=InceptionCrop(8), threads=3)
    batches = iter(loader)
    list(islice(batches, 3))
    window, before = Window(settings, loader, 0.001), loader.counts()
    for loss in (1.0, 2.0):
        window.next(batches)
        time.sleep(0.05)  # the step
        window.add(12 * loss, Step(torch.tensor(loss), 3 * loss, torch.tensor(True)))
    taken, values = window.settle(), window.measure()
    now, seconds = loader.counts(), window.seconds
    assert window.images == 24
    assert seconds >= 0.1
    assert taken == [Taken(12, 1.0, 3.0, True), Taken(24, 2.0, 6.0, True)]
    assert (values["loss"], values["grad_norm"]) == (1.5, 6.0)
    assert values["utilisation"] == pytest.approx(0.001 * 24 / seconds)
    assert 50 <= values["step_ms_median"] <= values["step_ms_p95"] <= values["step_ms_max"] <= 1e3 * seconds
    assert 0.01 < values["memory_gb"] < 20
    assert "slowest_rank" not in values
    assert values["images_per_second"] == pytest.approx(24 / seconds)
    assert 0 < values["mb_per_second"] <= (now.bytes - before.bytes) / 1e6 / seconds
    assert 0 <= values["data_wait"] <= 1 - 0.1 / seconds
    assert 0 < values["decode_share"] <= (now.decode_seconds - before.decode_seconds) / 3 / seconds
    assert 0 < values["read_share"] <= (now.read_seconds - before.read_seconds) / 3 / seconds
    assert values["replaced"] == values["quarantined"] == 0
    assert "cache_hit_share" not in values

    window.clear()
    window.open()
    window.add(36, Step(torch.tensor(4.0), 5.0, torch.tensor(True)))
    window.add(48, Step(torch.tensor(float("nan")), 5.0, torch.tensor(False)))
    taken, values = window.settle(), window.measure()
    assert values["loss"] == 4.0
    assert values["data_wait"] == 0
    assert taken[0] == Taken(36, 4.0, 5.0, True)
    assert taken[1][0::3] == (48, False)
    assert window.images == 48

    window.clear()
    window.open()
    taken, values = window.settle(), window.measure()
    assert taken == []
    assert (values["loss"], values["grad_norm"], values["images_per_second"]) == (None, None, 0)
    batches.close()


def test_the_share_of_a_cache_is_that_of_the_window(folder, settings, tmp_path, alone):
    with serve_faults(folder) as server:
        cache = ChunkCache(tmp_path / "cache", 10**8)
        cached = {"cache": cache, "lanes": 1, "chunk": 4, "block": 4}  # two lanes may share a chunk, and ask twice
        for found, faults in ((0.0, 0), (1.0, 2)):
            server.fault, server.bad = "error", faults  # on the manifest: the chunks are in the cache
            loader = Loader(
                Dataset.open(server.url), global_batch=12, transform=InceptionCrop(8), threads=3, stop=36, **cached
            )
            window = Window(settings, loader, 0.001)
            for _ in loader:
                pass
            window.settle()
            values = window.measure()
            assert values["cache_hit_share"] == found
            assert values["retries"] == faults


def test_a_pause_between_two_lines_is_in_the_loss_and_not_in_the_speed(settings, folder, alone):
    loader = Loader(Dataset.open(folder), global_batch=12, transform=InceptionCrop(8), threads=1)
    window = Window(settings, loader, 0.001)
    window.add(12, Step(torch.tensor(1.0), 2.0, torch.tensor(True)))
    window.add(24, Step(torch.tensor(9.0), 9.0, torch.tensor(False)))
    window.settle()
    window.open()
    window.add(36, Step(torch.tensor(4.0), 5.0, torch.tensor(True)))
    time.sleep(0.05)
    assert [each.samples for each in window.settle()] == [36]
    values = window.measure()
    assert (values["loss"], values["grad_norm"]) == (2.5, 5.0)
    assert 12 / 0.2 < values["images_per_second"] <= 12 / 0.05
    assert window.images == 36

    resumed = Window(settings, loader, 0.001)
    resumed.load_state_dict(json.loads(json.dumps(window.state_dict())))
    resumed.load_state_dict(None)  # of a checkpoint from before
    resumed.settle()
    assert resumed.measure()["loss"] == 2.5
