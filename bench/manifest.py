"""What the manifest of 300 million samples in 30,000 shards costs: opening it, reading a shard's rows, bytes a sample.

The rows are synthetic, the files real and written as `shards build` writes them: hashes and sizes that do not
compress, keys, labels and positions as ImageNet-21k has them. Every shard has its sample table; so that this takes
a minute and little disk, they are hard links to fewer different ones.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import arguments, memory, report, row

from shards import manifest
from shards.store import Store, open_store

CLASSES = 21_843  # ImageNet-21k's
SAMPLES = 10_000  # a shard
BLOCK = 512  # of a tar


def main():
    args = arguments(__doc__)
    shards, different, rounds = (300, 3, 3) if args.quick else (30_000, 300, 5)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), shards, different)
        opened = [fresh(open_it, folder) for _ in range(rounds)]
        units = {"open": "s", "peak of memory": "MB", "above the imports": "MB"}
        rows = [row(name, unit, [each[name] for each in opened]) for name, unit in units.items()]
        rows.append(row("rows of a shard, cold", "ms", fresh(read_rows, folder, different)))
        rows += [row(name, "B/sample", values) for name, values in bytes_a_sample(Path(folder), different).items()]
    report("manifest", rows, {}, args.json)


def make(folder: Path, shards: int, different: int) -> None:
    """Write the manifest: all rows of ``shards.parquet``, ``different`` sample tables, and links to those."""
    store = open_store(folder)
    rng = np.random.default_rng(0)
    receipts = [write_samples(store, shard, rng) for shard in range(different)]
    for shard in range(different, shards):
        os.link(folder / manifest.samples_path(shard % different), folder / manifest.samples_path(shard))
    rows = {
        "path": [manifest.shard_path(shard) for shard in range(shards)],
        "samples": [SAMPLES] * shards,
        "bytes": [receipts[shard % different].bytes for shard in range(shards)],
        "sha256": [rng.bytes(32).hex() for _ in range(shards)],
    }
    manifest.write_table(store, manifest.SHARDS, pa.table(rows, schema=manifest.SHARDS_SCHEMA))
    classes = [f"n{number:08d}" for number in np.sort(rng.choice(10**8, CLASSES, replace=False))]
    images = sum(receipts[shard % different].image_bytes for shard in range(shards))
    info = manifest.Info(
        classes=classes,
        samples=SAMPLES * shards,
        bytes=sum(rows["bytes"]),
        image_bytes=images,
        shards=shards,
        digest=manifest.digest(classes, rows["sha256"], {}),
        build={},
    )
    manifest.write_info(store, info)


def write_samples(store: Store, shard: int, rng: np.random.Generator) -> manifest.Receipt:
    """Write one shard's sample table: photographs of 110 kB, in the order of a shuffle."""
    size = rng.lognormal(11.5, 0.5, SAMPLES).astype(np.int64)
    member = BLOCK + -(-size // BLOCK) * BLOCK + 2 * BLOCK  # header, image, and the member with its label
    offset = np.cumsum(member) - member + BLOCK
    label = rng.integers(0, CLASSES, SAMPLES)
    sides = np.where(rng.random((2, SAMPLES)) < 0.6, [[500], [375]], rng.integers(100, 2000, (2, SAMPLES)))
    rows = {
        "key": [f"n{7 * one + 1440764:08d}/n{7 * one + 1440764:08d}_{rng.integers(100_000)}" for one in label],
        "offset": offset,
        "size": size,
        "format": ["jpg"] * SAMPLES,
        "labels": label[:, None].tolist(),
        "weights": [None] * SAMPLES,
        "width": sides[0],
        "height": sides[1],
        "orientation": np.where(rng.random(SAMPLES) < 0.02, rng.integers(2, 9, SAMPLES), 1),
        "member": rng.integers(0, 1 << 32, SAMPLES, dtype=np.uint32),
        "xxh128": [rng.bytes(16) for _ in range(SAMPLES)],
    }
    receipt = manifest.Receipt(
        sha256=rng.bytes(32).hex(),
        bytes=int(member.sum()) + 2 * BLOCK,
        samples=SAMPLES,
        image_bytes=int(size.sum()),
        plan=rng.bytes(32).hex(),
    )
    manifest.write_samples(store, manifest.samples_path(shard), rows, receipt)
    return receipt


def fresh(function: Callable, *args: object) -> object:
    """Call a function in a process of its own, whose memory is then the function's alone."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def open_it(folder: str) -> dict[str, float]:
    """Open the data set; the memory is that of the whole process, and what came on top of the imports."""
    from shards.dataset import Dataset

    imported = memory("VmRSS")
    began = perf_counter()
    dataset = Dataset.open(folder)
    seconds = perf_counter() - began
    if not len(dataset):
        raise RuntimeError("nothing in it")
    peak = memory("VmHWM")
    return {"open": seconds, "peak of memory": peak, "above the imports": peak - imported}


def read_rows(folder: str, different: int) -> list[float]:
    """Return the milliseconds that each of many shards' rows takes, its table not in the machine's page cache."""
    from shards.dataset import Dataset

    dataset = Dataset.open(folder)
    shards = len(dataset.shard_sizes)
    dataset.rows(shards - 1)  # the first call of a function pays for its loading
    milliseconds = []
    for one in range(different - 1):  # each of the different tables, through links from everywhere
        shard = one + different * ((7 * one) % (shards // different))
        with open(Path(folder) / manifest.samples_path(shard), "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = perf_counter()
        rows = dataset.rows(shard)
        milliseconds.append(1e3 * (perf_counter() - began))
        if len(rows) != SAMPLES:
            raise RuntimeError(f"shard {shard} has {len(rows)} rows")
    return milliseconds


def bytes_a_sample(folder: Path, different: int) -> dict[str, list[float]]:
    """Return what the manifest takes on disk, in all and by column, in bytes a sample."""
    every = [os.stat(path).st_size for path in (folder / "manifest/samples").iterdir()]
    opening = sum(os.stat(folder / path).st_size for path in (manifest.DATASET, manifest.SHARDS))
    found = {"manifest": [(opening + sum(every)) / (SAMPLES * len(every))]}
    for shard in range(different):
        group = pq.read_metadata(folder / manifest.samples_path(shard)).row_group(0)
        for index in range(group.num_columns):
            column = group.column(index)
            name = column.path_in_schema.partition(".")[0]
            found.setdefault(name, []).append(column.total_compressed_size / SAMPLES)
    return found


if __name__ == "__main__":
    main()
