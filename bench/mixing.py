"""The shards that a peer draws batches from, for bench/shuffle.py: ``mixing.py PEER FILE`` and the fields of Run.

Runs in the peers' environment, and calls their own code; writes int64 [batches, ranks, local batch] as .npy.
"""

import json
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np


class Run(NamedTuple):
    """A training run, and how many of its batches to look at."""

    shards: int
    shard_samples: int
    nodes: int
    ranks_a_node: int
    workers: int  # a rank
    local_batch: int
    batches: int

    @property
    def ranks(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_a_node

    def steps(self) -> np.ndarray:
        """Return the batches looked at, evenly over the middle half of an epoch; multiples of the workers."""
        every = self.shards * self.shard_samples // (self.ranks * self.local_batch)
        return np.linspace(every // 4, 3 * every // 4, self.batches).astype(np.int64)


def webdataset(run: Run) -> np.ndarray:
    """Draw with webdataset's splitters, shuffle of shards and shuffle buffer; each worker makes whole batches."""
    import webdataset as wds

    def samples(shards: Iterator[dict]) -> Iterator[int]:
        for shard in shards:
            yield from [int(shard["url"])] * run.shard_samples

    def batches(rank: int, worker: int) -> Iterator[list[int]]:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(run.ranks)}
        os.environ |= {"WORKER": str(worker), "NUM_WORKERS": str(run.workers)}
        pipeline = wds.DataPipeline(
            wds.SimpleShardList([str(shard) for shard in range(run.shards)]),
            wds.split_by_node,
            wds.split_by_worker,
            wds.shuffle(100, seed=rank * run.workers + worker),
            samples,
            wds.shuffle(5000, seed=rank * run.workers + worker),
            wds.batched(run.local_batch, collation_fn=None),
        )
        yield from pipeline

    steps = run.steps()
    drawn = np.empty((run.batches, run.ranks, run.local_batch), np.int64)
    for rank in range(run.ranks):
        for worker in range(run.workers):  # the workers of a rank take turns
            mine = np.flatnonzero(steps % run.workers == worker)
            made = list(islice(batches(rank, worker), int(max(steps[mine], default=0)) // run.workers + 1))
            for i in mine:
                drawn[i, rank] = made[steps[i] // run.workers]
    return drawn


def streaming(run: Run) -> np.ndarray:
    """Draw with mosaicml-streaming's partition and its py1e, as ``StreamingDataset`` calls them."""
    only_part("streaming", "streaming.base")  # what they import themselves wants transformers and every cloud's client
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    samples = run.shards * run.shard_samples
    ids = get_partitions("relaxed", samples, run.nodes, run.nodes, run.ranks_a_node, run.workers, run.local_batch)
    sizes = np.full(run.shards, run.shard_samples)
    shuffled = get_shuffle("py1e", sizes, run.nodes, 0, 0, max(4_000_000 // run.nodes, 1 << 18))
    ids = ids.reshape(run.ranks, run.workers, -1, run.local_batch)
    steps = run.steps()
    picked = ids[:, steps % run.workers, steps // run.workers].transpose(1, 0, 2)
    return shuffled[picked] // run.shard_samples


def only_part(*packages: str) -> None:
    """Let modules of packages be imported without the packages' own ``__init__``."""
    for name in packages:
        module = ModuleType(name)
        spec = find_spec(name)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = module


if __name__ == "__main__":
    peer, file, *fields = sys.argv[1:]
    shards = {each.__name__: each for each in (webdataset, streaming)}[peer](Run(*map(int, fields)))
    np.save(Path(file), shards)
    print(json.dumps({"batches": len(shards)}))
