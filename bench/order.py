"""How long the order of 300 million samples takes to plan and to seek in, and what memory it needs."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter

import numpy as np
from common import arguments, memory, report, row

from shards.order import Order, choose_shuffle, rank_positions

MEAN_BYTES = 100_000  # of a sample: gives chunks of 64, so 4.7 million of them
ROUNDS = 5


def main():
    args = arguments(__doc__)
    shards = 300 if args.quick else 30_000
    rounds = [fresh(shards) for _ in range(3 if args.quick else ROUNDS)]
    units = {"plan": "s", "seek": "ms", "next batch": "ms", "memory": "MB"}
    rows = [row(name, unit, [each[name] for each in rounds]) for name, unit in units.items()]
    report("order", rows, {}, args.json)


def fresh(shards: int) -> dict[str, float]:
    """Measure in a process of its own, whose peak of memory is then the order's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, shards).result()


def measure(shards: int) -> dict[str, float]:
    """Plan an epoch of shards of 10,000, then seek to one rank's batch in the midst of it and read on."""
    sizes = np.full(shards, 10_000)
    samples = int(sizes.sum())
    choose_shuffle(samples, MEAN_BYTES)
    before = memory("VmRSS")

    began = perf_counter()
    order = Order(sizes, 0, choose_shuffle(samples, MEAN_BYTES))
    order.plan(0)
    plan = perf_counter() - began

    order.locate(np.arange(3))  # the first call of a function pays for its loading
    rng, seeks = np.random.default_rng(0), []
    for position in rng.integers(0, samples - 4096, 20).tolist():
        began = perf_counter()
        order.locate(rank_positions(position, 4096, 5, 64))
        seeks.append(perf_counter() - began)

    began = perf_counter()
    for step in range(100):
        order.locate(rank_positions(samples // 2 + 4096 * step, 4096, 5, 64))
    step = (perf_counter() - began) / 100
    return {
        "plan": plan,
        "seek": 1e3 * float(np.median(seeks)),
        "next batch": 1e3 * step,
        "memory": memory("VmHWM") - before,
    }


if __name__ == "__main__":
    main()
