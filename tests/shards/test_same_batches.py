"""Promise 1: global batches are a matter of data, seed and batch size, wherever the data lie and whoever reads them."""

import hashlib
import json
import random
from itertools import islice, product

import numpy as np
import pytest

from shards.augment import InceptionCrop
from shards.build import build
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.loader import Loader
from shards.store import open_store
from tests.shards.images import make_source
from tests.shards.servers import serve_faults

GLOBAL_BATCH = 24  # 1, 2, 3, 4 and 8 divide it
STEPS = 6  # 144 samples: past two edges of an epoch of 57
WORLD_SIZES, THREADS, PLACES = (1, 2, 3, 4, 8), (1, 4), ("local", "http", "s3")


@pytest.fixture
def urls(tmp_path, s3):
    """One data set of 60 samples less a drop list of 3, in a folder, on a web server and in a bucket."""
    folder = tmp_path / "set"
    build(make_source(tmp_path / "source", classes=3, each=20), folder, shard_samples=8, workers=1)
    write_exclude(folder, "v1", [(0, 3, "blurred"), (2, 0, "blurred"), (6, 5, "blurred")])
    bucket = open_store(f"{s3}/set")
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.write(path.relative_to(folder).as_posix(), path.read_bytes())
    with serve_faults(folder) as server:
        yield dict(zip(PLACES, (str(folder), server.url, f"{s3}/set"), strict=True))


def run(dataset: Dataset, steps: int, world_size: int, threads: int, state: dict | None = None) -> tuple[list, dict]:
    """Return the hash of each of the next global batches, put together from those of all ranks, and the state after."""
    ranks = []
    for rank in range(world_size):
        loader = Loader(
            dataset, global_batch=GLOBAL_BATCH, transform=InceptionCrop(16), rank=rank, world_size=world_size, seed=7,
            threads=threads, lanes=6, chunk=8, block=8,
        )  # fmt: skip
        if state:
            loader.load_state_dict(state)
        ranks.append((loader, list(islice(loader, steps))))
    hashes = []
    for parts in zip(*(batches for _, batches in ranks), strict=True):
        positions = np.concatenate([part.positions for part in parts])
        order, found = np.argsort(positions), hashlib.sha256()
        for name in ("positions", "labels", "images"):
            found.update(np.concatenate([getattr(part, name) for part in parts])[order].tobytes())
        hashes.append(found.hexdigest())
    states = [json.loads(json.dumps(loader.state_dict())) for loader, _ in ranks]
    assert all(state == states[0] for state in states)
    return hashes, states[0]


def test_global_batches_are_bit_identical_for_any_world_size_threads_place_and_restart(urls, capsys):
    data = {place: Dataset.open(url, "v1") for place, url in urls.items()}
    expected, _ = run(data["local"], STEPS, 1, 1)
    assert len(set(expected)) == STEPS
    chance = random.Random(0)
    for place, world_size, threads in product(PLACES, WORLD_SIZES, THREADS):
        cold, _ = run(data[place], STEPS, world_size, threads)
        assert cold == expected, (place, world_size, threads)
        stop = chance.randrange(1, STEPS)  # and on from there, as another kind of run stopped
        first = chance.choice(PLACES), chance.choice(WORLD_SIZES), chance.choice(THREADS)
        begun, state = run(data[first[0]], stop, *first[1:])
        rest, _ = run(data[place], STEPS - stop, world_size, threads, state)
        assert begun + rest == expected, (first, stop, place, world_size, threads)
    with capsys.disabled():
        digest = hashlib.sha256("".join(expected).encode()).hexdigest()
        runs = len(PLACES) * len(WORLD_SIZES) * len(THREADS)
        print(f"\n{STEPS} global batches of {GLOBAL_BATCH}: {digest[:16]} in {runs} cold and {runs} resumed runs")
