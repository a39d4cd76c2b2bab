"""Remote samples come by chunks, ahead of need, once a lane, and leave memory when they are done."""

import hashlib
import threading
import time
from itertools import islice

import numpy as np
import pytest

from shards.augment import InceptionCrop, Resize
from shards.chunks import ChunkReader
from shards.dataset import Dataset
from shards.evaluation import EvaluationLoader
from shards.loader import Loader
from shards.order import Order, Shuffle
from tests.shards.servers import serve_faults

SHUFFLE = {"lanes": 4, "chunk": 4, "block": 8}


def digest(dataset, batches, start=0, world_size=1, threads=2, batch=12, **options):
    """The hash of global batches, put together from those of all ranks."""
    loaders = [
        Loader(dataset, global_batch=batch, transform=InceptionCrop(8), rank=rank, world_size=world_size,
               threads=threads, **SHUFFLE, **options)
        for rank in range(world_size)
    ]  # fmt: skip
    found = hashlib.sha256()
    for loader in loaders:
        loader.samples = start
    streams = [iter(loader) for loader in loaders]
    for _ in range(batches):
        parts = [next(stream) for stream in streams]
        positions = np.concatenate([part.positions for part in parts])
        order = np.argsort(positions)
        found.update(positions[order].tobytes())
        found.update(np.concatenate([part.images for part in parts])[order].tobytes())
        found.update(np.concatenate([part.labels for part in parts])[order].tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_those_of_the_local_data_set(ninety, ninety_url, world_size):
    batches = 18  # 216 samples: past two edges of an epoch of 90
    expected = digest(Dataset.open(ninety), batches)
    assert digest(Dataset.open(ninety_url), batches, world_size=world_size) == expected
    assert digest(Dataset.open(ninety_url), 5, start=120, world_size=world_size) == digest(
        Dataset.open(ninety), 5, start=120
    )


def test_each_chunk_is_read_once_a_lane_and_then_let_go(ninety):
    local, most = Dataset.open(ninety), 0
    order = Order(local.shard_sizes, 0, Shuffle(**SHUFFLE))
    chunks = int((-(-local.shard_sizes // 4)).sum())
    with serve_faults(ninety) as server:
        reader = ChunkReader(Dataset.open(server.url), order)
        for position in range(90):
            if position % 6 == 0:
                reader.release(position)
                reader.ahead(np.arange(position, min(position + 12, 90)))
            _, shard, index = (int(x[0]) for x in order.locate(np.array([position])))
            assert reader.read(shard, index) == local.read(shard, index)
            most = max(most, len(reader._held))
        read = sum(path.endswith(".tar") for path in server.paths)
    assert chunks <= read <= chunks + 3  # an edge between lanes may cut a chunk
    assert most <= 4 * (8 // 4 + 2) + 12
    reader.release(90)
    assert not reader._held
    reader.close()


def test_the_first_batch_waits_for_its_own_chunks_only(ninety):
    order = Order(Dataset.open(ninety).shard_sizes, 0, Shuffle(**SHUFFLE))
    for start in (0, 120):
        _, shard, index = order.locate(np.arange(start, start + 12))
        with serve_faults(ninety) as server:
            loader = Loader(Dataset.open(server.url), global_batch=12, transform=Resize(8), **SHUFFLE)
            loader.samples = start
            batches = iter(loader)
            next(batches)
            chunks = len(set(zip(shard.tolist(), (index // 4).tolist(), strict=True)))
            assert sum(path.endswith(".tar") for path in server.paths) == chunks
            next(batches)  # from now on, far ahead
            deadline = time.monotonic() + 10
            while sum(path.endswith(".tar") for path in server.paths) < 20:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            batches.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_together_what_lies_together(ninety, world_size):
    with serve_faults(ninety) as server:
        for rank in range(world_size):
            there, here = (
                list(EvaluationLoader(Dataset.open(data), 8, transform=Resize(8), rank=rank, world_size=world_size))
                for data in (server.url, ninety)
            )
            for ours, local in zip(there, here, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(ours, local, strict=True))
        reads = sum(path.endswith(".tar") for path in server.paths)
    assert reads <= 12 + 6  # 12 batches over all ranks, and one more at each edge of a shard
    assert not [t for t in threading.enumerate() if t.name.startswith(("fetch", "decode"))]


def test_an_evaluation_that_is_left_ends_its_threads(ninety_url):
    for _ in EvaluationLoader(Dataset.open(ninety_url), 8, transform=Resize(8)):
        break
    deadline = time.monotonic() + 10  # what is on the way is not waited for
    while [t for t in threading.enumerate() if t.name.startswith(("fetch", "decode"))]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_needed_until_covers_every_use():
    rng = np.random.default_rng(0)
    for lanes, chunk, block in [(4, 4, 8), (3, 5, 7), (1, 2, 16), (6, 8, 4)]:
        order = Order(rng.integers(1, 20, 12), 1, Shuffle(lanes, chunk, block))
        positions = np.arange(2 * order.samples)
        epoch, shard, index = order.locate(positions)
        until = order.needed_until(positions)
        uses = {}
        for p, e, s, i in zip(positions, epoch, shard, index // chunk, strict=True):
            lane = p % order.samples % lanes
            uses.setdefault((e, s, i, lane), []).append(p)
        for same in uses.values():
            assert until[same].min() >= same[-1]
            assert (until[same] == until[same[0]]).all()


def test_a_jump_forgets_what_was_read_ahead(ninety, ninety_url, monkeypatch):
    made = []
    monkeypatch.setattr("shards.loader.ChunkReader", lambda *a, **b: made.append(ChunkReader(*a, **b)) or made[0])
    stream = Loader(Dataset.open(ninety_url), global_batch=12, transform=InceptionCrop(8), **SHUFFLE)
    stream.samples = 9000
    batches = iter(stream)
    list(islice(batches, 2))
    assert min(made[0]._until.values()) >= 9000
    stream.samples = 60
    assert next(batches).positions[0] == 60
    assert max(made[0]._until.values()) < 9000  # else it would stay until the stream comes there
    local = Loader(Dataset.open(ninety), global_batch=12, transform=InceptionCrop(8), **SHUFFLE)
    local.samples = 72
    assert np.array_equal(next(batches).images, next(iter(local)).images)
