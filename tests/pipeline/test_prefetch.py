import threading
import time
from contextlib import closing
from itertools import count

import numpy as np
import pytest
import torch

from pipeline.images import to_model_input
from pipeline.prefetch import one_ahead, pinned_array, prefetched
from shards.augment import InceptionCrop
from shards.build import build
from shards.dataset import Dataset
from shards.errors import PatchmillError
from shards.loader import Loader
from tests.shards.images import make_source

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prefetch")
    build(make_source(folder / "source", classes=2, each=20), folder / "set", shard_samples=13, workers=1)
    return Dataset.open(folder / "set")


def loader(dataset, **options):
    return Loader(dataset, global_batch=12, transform=InceptionCrop(8), **options)


def test_on_the_cpu_batches_are_those_of_the_loader_and_none_is_ahead(dataset):
    mine, plain = loader(dataset, allocate=pinned_array), iter(loader(dataset))
    batches = prefetched(iter(mine), lambda batch: (to_model_input(batch.images, CPU), torch.tensor(batch.labels)), CPU)
    for step in range(1, 6):
        images, labels = next(batches)
        want = next(plain)
        pixels = want.images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
        assert (images.numpy() == pixels).all()
        assert labels.tolist() == want.labels.tolist()
        assert mine.samples == step * 12
    assert [t for t in threading.enumerate() if t.name.startswith("decode")]
    batches.close()
    plain.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "prefetch"))]


def test_the_next_one_is_fetched_while_the_last_one_is_used():
    begun = []

    def fetch():
        begun.append(time.perf_counter())
        time.sleep(0.1)
        return len(begun) if len(begun) < 4 else None

    found = []
    for item in one_ahead(fetch):
        time.sleep(0.05)
        assert len(begun) == item + 1  # begun already, and no more than one
        found.append(item)
    assert found == [1, 2, 3]


def test_an_error_of_a_fetch_comes_in_its_turn_and_the_thread_ends():
    numbers = count()

    def fetch():
        if (number := next(numbers)) == 2:
            raise PatchmillError("the disk is gone")
        return number + 1

    ahead = one_ahead(fetch)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(PatchmillError, match="the disk is gone"):
        next(ahead)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_closing_waits_for_the_fetch_under_way(dataset):
    """A generator must not be closed while another thread is in it."""
    batches = iter(loader(dataset))
    with closing(batches), closing(one_ahead(lambda: next(batches))) as ahead:
        next(ahead)
    assert not [t for t in threading.enumerate() if t.name.startswith(("decode", "prefetch"))]
