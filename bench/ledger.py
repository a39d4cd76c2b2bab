"""What the record of delivered samples costs a training step and the disk, and how fast an audit goes through it."""

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
from common import arguments, report, row

from shards import manifest
from shards.audit import audit
from shards.dataset import Dataset
from shards.ledger import Ledger, new_segment
from shards.order import Order, choose_shuffle, rank_positions
from shards.store import open_store

MEAN_BYTES = 100_000  # of an image
BATCH = 4096


def main():
    args = arguments(__doc__)
    shards, audited, worlds, rounds = (300, 3, [32], 2) if args.quick else (30_000, 3_000, [8, 32, 256], 5)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in worlds:
            noted = [fresh(note, f"{folder}/{ranks}-{i}", shards, ranks, i) for i in range(rounds)]
            for name, unit in {"bytes": "B/sample", "a step": "us", "longest step": "ms", "checkpoint": "ms"}.items():
                rows.append(row(f"{name}, {BATCH // ranks} samples a step", unit, [each[name] for each in noted]))
        checked = [fresh(check, f"{folder}/audit-{i}", audited) for i in range(min(rounds, 3))]
        for name, unit in {"audit, one process": "samples/s", "its peak of memory": "MB"}.items():
            rows.append(row(name, unit, [each[name] for each in checked]))
    report("ledger", rows, {}, args.json)


def fresh(function: Callable, *arguments: object) -> dict[str, float]:
    """Call a function in a process of its own, whose peak of memory is then the function's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make(folder: str, shards: int) -> tuple[Dataset, Order]:
    """Write the manifest of shards of 10,000 images, without their rows: neither ledger nor audit reads those."""
    store = open_store(folder, create=True)
    table = {
        "path": [manifest.shard_path(shard) for shard in range(shards)],
        "samples": [10_000] * shards,
        "bytes": [10_000 * MEAN_BYTES] * shards,
        "sha256": [f"{shard:064x}" for shard in range(shards)],
    }
    manifest.write_table(store, manifest.SHARDS, pa.table(table, schema=manifest.SHARDS_SCHEMA))
    samples, digest = sum(table["samples"]), manifest.digest(["a"], table["sha256"], {})
    info = manifest.Info(["a"], samples, sum(table["bytes"]), sum(table["bytes"]), shards, digest, build={})
    manifest.write_info(store, info)
    dataset = Dataset.open(folder)
    return dataset, Order(dataset.shard_sizes, 0, choose_shuffle(samples, MEAN_BYTES))


def note(folder: str, shards: int, ranks: int, seed: int) -> dict[str, float]:
    """Note what one rank gets in steps amidst an epoch, 4 full frames and a part of one."""
    dataset, order = make(folder, shards)
    start = int(np.random.default_rng(seed).integers(len(dataset) // 2)) // BATCH * BATCH
    steps = [step(order, start + i * BATCH, BATCH, ranks - 1, ranks) for i in range(int(4.5 * 65536 * ranks) // BATCH)]
    ledger = Ledger(new_segment(f"{folder}/ledger"), dataset, order, ranks - 1, ranks)
    ledger.append(start - BATCH, step(order, start - BATCH, BATCH, ranks - 1, ranks))  # the first one opens the file
    ledger.commit()
    file = next(Path(folder).glob("ledger/*/rank-*"))
    before, seconds = file.stat().st_size, []
    for i, each in enumerate(steps):
        began = perf_counter()
        ledger.append(start + i * BATCH, each)
        seconds.append(perf_counter() - began)
    began = perf_counter()
    ledger.commit()
    checkpoint = perf_counter() - began
    samples = len(steps) * BATCH // ranks
    return {
        "bytes": (file.stat().st_size - before) / samples,
        "a step": 1e6 * sum(seconds) / len(steps),
        "longest step": 1e3 * max(seconds),
        "checkpoint": 1e3 * checkpoint,
    }


def check(folder: str, shards: int) -> dict[str, float]:
    """Audit an epoch, delivered by 8 ranks."""
    dataset, order = make(f"{folder}/data", shards)
    segment, many = new_segment(f"{folder}/ledger"), 1 << 18
    for rank in range(8):
        ledger = Ledger(segment, dataset, order, rank, 8)
        for start in range(0, len(dataset), many):
            ledger.append(start, step(order, start, min(many, len(dataset) - start), rank, 8))
        ledger.commit()
    checkpoint = Path(folder) / "checkpoints" / "samples-1"
    checkpoint.mkdir(parents=True)
    state = {"state": {"loader": {"samples": len(dataset), "ledger": segment.name}}}
    (checkpoint / "checkpoint.json").write_text(json.dumps(state))
    return fresh(timed_audit, folder)


def timed_audit(folder: str) -> dict[str, float]:
    """Time an audit that must find nothing."""
    began = perf_counter()
    found = audit(folder, workers=1)
    seconds = perf_counter() - began
    if found.counts:
        raise RuntimeError(f"the audit found {found.misfits}")
    return {"audit, one process": found.positions / seconds, "its peak of memory": memory()}


def step(order: Order, position: int, batch: int, rank: int, ranks: int) -> SimpleNamespace:
    """Return a rank's share of a batch, as far as the ledger looks at it."""
    positions = rank_positions(position, batch, rank, ranks)
    _, shard, index = order.locate(positions)
    places = {"shards": shard.astype(np.int32), "indices": index.astype(np.int32)}
    return SimpleNamespace(positions=positions, **places, replaced={})


def memory() -> float:
    """Return the peak of memory of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    main()
