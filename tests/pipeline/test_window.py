import time
from itertools import islice

import pytest

from pipeline.config import TrainSettings, check
from pipeline.window import Window
from shards.augment import InceptionCrop
from shards.build import build
from shards.dataset import Dataset
from shards.loader import Loader
from tests.shards.images import make_source


@pytest.fixture
def loader(tmp_path):
    build(make_source(tmp_path / "source", classes=2, each=20), tmp_path / "set", shard_samples=13, workers=1)
    return Loader(Dataset.open(tmp_path / "set"), global_batch=12, transform=InceptionCrop(8), threads=3)


def test_a_window_measures_what_happened_in_it_alone(loader, alone):
    settings = check(
        TrainSettings,
        {"duration": "1 step", "global_batch": 12, "data": {"train": "-", "threads": 3}, "model": {"name": "a"}},
        "test",
    )
    batches = iter(loader)
    list(islice(batches, 3))
    window, before = Window(settings, loader), loader.counts()
    for loss in (1.0, 2.0):
        window.next(batches)
        time.sleep(0.05)  # the step
        window.add(loss)
    values, stopping = window.measure(False)
    now, seconds = loader.counts(), window.seconds
    assert not stopping
    assert window.images == 24
    assert seconds >= 0.1
    assert values["loss"] == 1.5
    assert values["images_per_second"] == pytest.approx(24 / seconds)
    assert 0 < values["mb_per_second"] <= (now.bytes - before.bytes) / 1e6 / seconds
    assert 0 <= values["data_wait"] <= 1 - 0.1 / seconds
    assert 0 < values["decode_share"] <= (now.decode_seconds - before.decode_seconds) / 3 / seconds
    assert 0 < values["read_share"] <= (now.read_seconds - before.read_seconds) / 3 / seconds
    assert values["replaced"] == values["quarantined"] == 0

    window.open()
    window.add(4.0)
    values, stopping = window.measure(True)
    assert stopping
    assert values["loss"] == 4.0
    assert values["data_wait"] == 0
    assert window.images == 36
    batches.close()
