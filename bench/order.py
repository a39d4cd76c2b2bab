"""How long the order of 303 million and of 2 billion samples takes to start and to seek in, and what memory it needs.

Start is what one rank of 2,048 does before its first batch, at some place of the epoch: plan and seek.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter

import numpy as np
from common import arguments, memory, report, row

from shards.order import Order, choose_shuffle, rank_positions

MEAN_BYTES = 100_000  # of a sample: gives chunks of 41, so 7.4 million of them
RANKS, RANK, GLOBAL_BATCH = 2048, 5, 32_768


def main():
    args = arguments(__doc__)
    sizes = (300, 500) if args.quick else (30_300, 200_000)  # shards of 10,000
    names = ("303 million samples", "2 billion samples")
    rounds = {name: [] for name in names}
    for _ in range(3 if args.quick else 5):
        for name, shards in zip(names, sizes, strict=True):
            rounds[name].append(fresh(shards))
    units = {"start": "s", "seek": "ms", "next batch": "ms", "memory": "MB"}
    rows = [row(f"{name}: {what}", unit, [each[what] for each in rounds[name]])
            for name in names for what, unit in units.items()]  # fmt: skip
    report("order", rows, {}, args.json)


def fresh(shards: int) -> dict[str, float]:
    """Measure in a process of its own, whose peak of memory is then the order's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, shards).result()


def measure(shards: int) -> dict[str, float]:
    """Start at a batch in the midst of an epoch of shards of 10,000, then seek elsewhere and read on."""
    sizes = np.full(shards, 10_000)
    samples = int(sizes.sum())
    before = memory("VmRSS")
    began = perf_counter()
    order = Order(sizes, 0, choose_shuffle(samples, MEAN_BYTES))
    order.locate(rank_positions(samples // 3, GLOBAL_BATCH, RANK, RANKS))
    start = perf_counter() - began

    rng, seeks = np.random.default_rng(0), []
    for position in rng.integers(0, samples - GLOBAL_BATCH, 20).tolist():
        began = perf_counter()
        order.locate(rank_positions(position, GLOBAL_BATCH, RANK, RANKS))
        seeks.append(perf_counter() - began)

    began = perf_counter()
    for step in range(100):
        order.locate(rank_positions(samples // 2 + GLOBAL_BATCH * step, GLOBAL_BATCH, RANK, RANKS))
    step = (perf_counter() - began) / 100
    return {
        "start": start,
        "seek": 1e3 * float(np.median(seeks)),
        "next batch": 1e3 * step,
        "memory": memory("VmHWM") - before,
    }


if __name__ == "__main__":
    main()
