"""How well batches are mixed: distinct source shards in each, where the data lies sorted by class, a class a shard.

1,280 shards of 10,000; 64 ranks on 8 nodes, 8 workers each, 64 samples a rank: batches of 4,096. Ours has its own
choice of lanes, chunks and blocks for samples of 100 kB. The peers are the code of their packages over numbers instead
of images: webdataset with a buffer of 5,000, streaming as it is set by default. Ideal is what draws at random from all
samples would give on average.
"""

import tempfile
from pathlib import Path

import numpy as np
from common import arguments, report, row
from mixing import Run
from peers import PYTHON, is_installed, run_script

from shards.order import Order, choose_shuffle

NEEDED = {"webdataset": ("webdataset",), "streaming": ("streaming",)}  # in the peers' environment
MEAN_BYTES = 100_000
QUICK = Run(shards=64, shard_samples=500, nodes=2, ranks_a_node=4, workers=2, local_batch=16, batches=5)
FULL = Run(shards=1280, shard_samples=10_000, nodes=8, ranks_a_node=8, workers=8, local_batch=64, batches=100)


def main():
    args = arguments(__doc__)
    run = QUICK if args.quick else FULL
    drawn = {"patchmill": ours(run)}
    with tempfile.TemporaryDirectory() as folder:
        for peer, modules in NEEDED.items():
            if is_installed(*modules):
                drawn[peer] = theirs(peer, run, Path(folder) / f"{peer}.npy")
    rows, ratios = [], {}
    for batch, size in (("local", run.local_batch), ("global", run.ranks * run.local_batch)):
        ideal = run.shards * (1 - (1 - 1 / run.shards) ** size)
        rows.append(row(f"ideal, {batch} batch of {size:,}", "shards", [ideal]))
        found = {peer: distinct(shards.reshape(-1, size)) for peer, shards in drawn.items()}
        rows += [row(f"{peer}, {batch} batch of {size:,}", "shards", counts) for peer, counts in found.items()]
        mean = {peer: float(np.mean(counts)) for peer, counts in found.items()}
        rows += [row(f"{peer}, {batch}, of the ideal", "%", [100 * each / ideal]) for peer, each in mean.items()]
        ratios |= {f"{peer}, {batch}": mean["patchmill"] / mean[peer] if peer in mean else None for peer in NEEDED}
    report("shuffle", rows, ratios, args.json)


def ours(run: Run) -> np.ndarray:
    """Return the shards of batches in the midst of an epoch, int64 [batches, ranks, local batch]."""
    samples = run.shards * run.shard_samples
    order = Order(np.full(run.shards, run.shard_samples), 0, choose_shuffle(samples, MEAN_BYTES))
    size = run.ranks * run.local_batch
    starts = run.steps()[:, None] * size
    _, shard, _ = order.locate((starts + np.arange(size)).ravel())
    # Rank r takes the positions that are r modulo the ranks.
    return shard.reshape(run.batches, run.local_batch, run.ranks).transpose(0, 2, 1)


def theirs(peer: str, run: Run, path: Path) -> np.ndarray:
    """Return the same of a peer."""
    run_script(PYTHON, "mixing.py", peer, path, *run)
    return np.load(path)


def distinct(batches: np.ndarray) -> list[int]:
    """Count the distinct numbers in each row."""
    ordered = np.sort(batches, axis=1)
    return (1 + (np.diff(ordered, axis=1) != 0).sum(axis=1)).tolist()


if __name__ == "__main__":
    main()
