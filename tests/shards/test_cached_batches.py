"""Batches of remote data through the cache: the same bits, whatever the cache holds, and fewer reads."""

import json
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shards import manifest
from shards.augment import InceptionCrop
from shards.build import build
from shards.cache import MARK, ChunkCache
from shards.chunks import ChunkReader
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.loader import Loader
from shards.mixture import Mixture
from shards.order import Order, Shuffle
from shards.storesettings import StoreSettings
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.images import make_source, tree
from tests.shards.sources.servers import serve
from tests.shards.test_cache import chunks_in, on_disk
from tests.shards.test_chunks import digest as digest_of

ROOT = Path(__file__).parents[2]
BATCHES = 36  # of 6: past two edges of an epoch of 90, and what is read ahead is less than one


def digest(data, batches=BATCHES, **options):
    return digest_of(Dataset.open(data) if isinstance(data, str | Path) else data, batches, batch=6, **options)


@pytest.fixture(autouse=True)
def _all_write(monkeypatch):
    """Chunks this small come all at once: keep them all, however busy the machine is."""
    monkeypatch.setattr("shards.cache.WRITERS", 100)


@pytest.fixture(scope="module")
def expected(ninety):
    return digest(ninety)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_the_same_cold_warm_half_full_and_damaged(ninety_url, expected, tmp_path, world_size):
    def run():
        cache = ChunkCache(tmp_path / "cache", 10**9)
        assert digest(ninety_url, world_size=world_size, cache=cache) == expected
        return cache

    cold = run()
    chunks = chunks_in(tmp_path / "cache")
    assert len(chunks) == 27  # 6 shards of 13 in 4 chunks each, and one of 12 in 3
    assert cold.misses >= 27
    warm = run()
    assert (warm.misses, chunks_in(tmp_path / "cache")) == (0, chunks)
    assert warm.bytes > 0
    for name in sorted(chunks)[::2]:
        (tmp_path / "cache" / name).unlink()
    assert 0 < run().misses <= 14 * world_size
    for name in sorted(chunks)[1::3]:
        path = tmp_path / "cache" / name
        path.write_bytes(path.read_bytes()[::-1])
    assert 0 < run().misses <= 9 * world_size
    assert run().misses == 0


def test_a_mixture_goes_through_the_cache_too(ninety, ninety_url, even, tmp_path):
    def batches(data, cache=None):
        mixture = Mixture([(Dataset.open(data), 3), (Dataset.open(even), 1)])
        loader = Loader(mixture, global_batch=6, transform=InceptionCrop(8), cache=cache, chunk=4, stop=300)
        return [(batch.images.tobytes(), batch.labels.tolist()) for batch in loader]

    expected = batches(ninety)
    assert batches(ninety_url, ChunkCache(tmp_path / "small", 20 * 8192)) == expected
    assert 0 < on_disk(tmp_path / "small") <= 20 * 8192
    cache = ChunkCache(tmp_path / "large", 10**9)
    assert batches(ninety_url, cache) == expected
    misses = cache.misses
    for data in (ninety_url, ninety):  # of the last, only one source is remote
        assert batches(data, cache) == expected
    assert cache.misses == misses
    assert cache.hits > misses


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_batches_are_the_same_with_little_room(ninety_url, expected, tmp_path, share):
    limit = int(27 * 8192 * share)
    cache = ChunkCache(tmp_path / "cache", limit)
    assert digest(ninety_url, world_size=2, cache=cache) == expected
    assert 0 < on_disk(tmp_path / "cache") <= limit
    assert cache.hits > 0


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """64 chunks of 4 samples, all as large."""
    image = plain("red", (16, 16))
    shards = [[Made(f"{s}-{i}", image + bytes([s, i]) * 700) for i in range(16)] for s in range(16)]
    folder = write_dataset(tmp_path_factory.mktemp("even"), ["class.0"], shards)
    with serve(folder) as url:
        yield url


def test_in_each_later_epoch_the_hits_are_what_the_cache_can_hold(even, tmp_path, monkeypatch):
    """Three epochs through the reader, by a clock that ticks evenly; a sixth of the data fits."""
    clock, room, batch = [10**18], 10, 8
    monkeypatch.setattr("time.time_ns", lambda: clock[0])
    monkeypatch.setattr("shards.cache._LOOK", float("inf"))
    dataset = Dataset.open(even, settings=StoreSettings(concurrency=1))
    order = Order(dataset.shard_sizes, 3, Shuffle(4, 4, 16))
    cache = ChunkCache(tmp_path, room * 8192)
    reader = ChunkReader(dataset, order, cache=cache)
    hits = []
    for position in range(0, 4 * order.samples, batch):
        reader.release(position)
        positions = np.arange(position, position + batch)
        reader.ahead(positions)
        for _, shard, index in zip(*order.locate(positions), strict=True):
            assert reader.read(int(shard), int(index)).key == f"{shard}-{index}"
        clock[0] += 10**9
        hits.append(cache.hits)
    reader.close()
    at = [hits[epoch * order.samples // batch - 1] for epoch in (1, 2, 3, 4)]
    assert at[0] <= 3  # chunks that are cut over two lanes
    for before, after in pairwise(at):
        assert room - 1 <= after - before <= room + 3
    assert len(chunks_in(tmp_path)) == room


def test_in_a_real_run_the_hits_are_nearly_what_the_cache_can_hold(even, tmp_path):
    room, epochs = 20, 5
    cache = ChunkCache(tmp_path, room * 8192)
    loader = Loader(
        Dataset.open(even), global_batch=4, transform=InceptionCrop(8), cache=cache, lanes=4, chunk=4, block=8
    )
    for batch in loader:
        if batch.positions[0] >= epochs * 256:
            break
    assert cache.hits + cache.misses >= epochs * 64
    # 31 % of the data fit; what was used last would hold 5 %.
    assert 0.75 * room * (epochs - 1) <= cache.hits <= (room + 3) * epochs
    assert on_disk(tmp_path) <= room * 8192


JOB = """
import json, sys
from shards.cache import ChunkCache
from tests.shards.test_cached_batches import digest
url, folder, limit, seed = sys.argv[1:]
cache = ChunkCache(folder, int(limit))
found = [digest(url, 45, seed=int(seed), cache=cache) for _ in range(2)]
print(json.dumps({"digest": found, "hits": cache.hits, "misses": cache.misses}))
"""


def test_two_jobs_share_a_cache_and_keep_its_limit(ninety, ninety_url, tmp_path):
    limit, most = 8 * 8192, []
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, ninety_url, tmp_path / "cache", str(limit), str(seed)],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for seed in (0, 1)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while any(job.poll() is None for job in jobs):
            assert time.monotonic() < deadline
            if (tmp_path / "cache" / MARK).exists():
                most.append(on_disk(tmp_path / "cache"))
        told = [json.loads(job.communicate(timeout=10)[0]) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    for seed, each in enumerate(told):
        assert each["digest"] == [digest(ninety, 45, seed=seed)] * 2
        assert each["hits"] > 10
    assert limit // 2 < max(most) <= limit


def test_a_full_disk_changes_no_batch(ninety_url, expected, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        cache = ChunkCache(disk / "cache", 10**9)
        assert digest(ninety_url, cache=cache) == expected
        assert capsys.readouterr().err == f"cache {disk}/cache: No space left on device; going on with what is in it\n"
        assert cache.hits > 0
    finally:
        subprocess.run(["umount", disk], check=True)


def test_local_data_use_no_cache_and_lose_nothing(ninety, ninety_url, expected, tmp_path):
    before = tree(ninety)
    for data in (ninety, ninety.as_uri()):
        assert digest(data, cache=ChunkCache(tmp_path / "local", 10_000)) == expected
    assert chunks_in(tmp_path / "local") == set()
    assert digest(ninety_url, cache=ChunkCache(tmp_path / "remote", 10_000)) == expected
    for data in (ninety, ninety / "shards"):
        with pytest.raises(UserError, match="holds something else"):
            ChunkCache(data, 10_000)
    assert tree(ninety) == before


def test_bytes_of_another_tar_are_not_kept_and_old_ones_not_taken_for_new(ninety, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(ninety, own)
    cache = ChunkCache(tmp_path / "cache", 10**9)
    with serve(own) as url:
        tar = own / manifest.shard_path(0)
        data = tar.read_bytes()
        tar.write_bytes(data[512:] + bytes(512))
        dataset = Dataset.open(url)
        reader = ChunkReader(dataset, Order(dataset.shard_sizes, 0, Shuffle(4, 4, 8)), cache=cache)
        reader.ahead(np.arange(90))
        with pytest.raises(UserError, match="is not the tar that"):
            reader.read(0, 0)
        reader.close()
        tar.write_bytes(data)
        assert digest(url, cache=cache) == digest(own)
        write_exclude(own, "less", [(shard, 3, "bad") for shard in range(7)])
        fewer = [Dataset.open(data, exclude="less") for data in (url, own)]
        chunks = chunks_in(cache.folder)
        assert digest(fewer[0], cache=cache) == digest(fewer[1])
        assert len(chunks_in(cache.folder) - chunks) > 14
        # Another data set under the same URL.
        build(make_source(tmp_path / "source", classes=4, each=25), tmp_path / "new", shard_samples=13, workers=1)
        for path in own.iterdir():
            shutil.rmtree(path)
        shutil.copytree(tmp_path / "new", own, dirs_exist_ok=True)
        assert digest(url, cache=cache) == digest(own)
