"""The time to the first batch of a rank that starts at sample 0, and of one that resumes at sample 150 million.

300 million samples in 30,000 shards: the real loader over a real manifest, whose shards are 8 real tars of 10,000
photographs of 55 kB each, again and again. Rank 5 of 64, 64 samples a rank; each start in a process of its own, in
turns, from opening the data set to the first batch; local, and over HTTP with ranges on this machine. What it reads
is in the machine's page cache.
"""

import multiprocessing
import os
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pyarrow as pa
from common import arguments, report, row
from photographs import little_noise, photographs
from webserver import serve

from shards import manifest
from shards.augment import InceptionCrop
from shards.build import build
from shards.dataset import Dataset
from shards.loader import Loader
from shards.store import open_store

TARS = 8
RANKS, RANK, GLOBAL_BATCH = 64, 5, 4096


def main():
    args = arguments(__doc__)
    shards, shard_samples, rounds = (300, 6, 1) if args.quick else (30_000, 10_000, 7)
    starts = {"at sample 0": 0, f"at sample {shards * shard_samples // 2:,}": shards * shard_samples // 2}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        few = little_noise(folder) if args.quick else enlarge(photographs(55), folder, shard_samples)
        repeat_shards(few, shards)
        seconds, megabytes = {}, {}
        with serve(few) as server:
            for place, url in (("local", str(few)), ("HTTP", server.url)):
                for _ in range(rounds + 1):
                    for name, samples in starts.items():
                        before = server.sent.value
                        found = fresh(url, samples)
                        read = found["bytes"] if place == "local" else server.sent.value - before
                        seconds.setdefault((place, name), []).append(found["seconds"])
                        megabytes.setdefault((place, name), []).append(read / 1e6)
    # The first of each only filled the page cache.
    rows = [row(f"{place}, first batch {name}", "s", values[1:]) for (place, name), values in seconds.items()]
    rows += [row(f"{place}, read {name}", "MB", values[1:]) for (place, name), values in megabytes.items()]
    ratios = {
        f"sample 0, {place}": rows[2 * i].value / rows[2 * i + 1].value for i, place in enumerate(("local", "HTTP"))
    }
    report("seek", rows, ratios, args.json)


def enlarge(data: Path, folder: Path, shard_samples: int) -> Path:
    """Build a data set of full shards out of the samples of a small one, again and again."""
    small = Dataset.open(data)
    (folder / "images/all").mkdir(parents=True)
    for i in range(len(small)):
        (folder / f"{i}.jpg").write_bytes(small[i].image)
    for i in range(TARS * shard_samples):
        os.link(folder / f"{i % len(small)}.jpg", folder / f"images/all/{i:06d}.jpg")
    build(folder / "images", folder / "set", shard_samples=shard_samples)
    shutil.rmtree(folder / "images")
    return folder / "set"


def repeat_shards(folder: Path, shards: int) -> None:
    """Let the manifest of a data set name its tars again and again, as so many shards."""
    store = open_store(folder)
    info = manifest.parse_info(store.read(manifest.DATASET), store.url)
    few = manifest.open_table(store, manifest.SHARDS, manifest.SHARDS_SCHEMA.names)
    for shard in range(info.shards, shards):
        os.link(folder / manifest.samples_path(shard % info.shards), folder / manifest.samples_path(shard))
    times = shards / info.shards
    many = pa.concat_tables([few] * -(-shards // info.shards))[:shards].combine_chunks()
    manifest.write_table(store, manifest.SHARDS, many)
    counts = {name: round(getattr(info, name) * times) for name in ("bytes", "image_bytes")}
    samples = sum(many["samples"].to_pylist())
    digest = manifest.digest(info.classes, many["sha256"].to_pylist(), info.build)
    manifest.write_info(store, replace(info, shards=shards, samples=samples, digest=digest, **counts))


def fresh(url: str, samples: int) -> dict[str, float]:
    """Measure in a process of its own, which has nothing cached."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(first_batch, url, samples).result()


def first_batch(url: str, samples: int) -> dict[str, float]:
    """Open a data set and get the first batch from a position on."""
    read, began = bytes_read(), perf_counter()
    transform = InceptionCrop(224)
    loader = Loader(Dataset.open(url), global_batch=GLOBAL_BATCH, rank=RANK, world_size=RANKS, transform=transform)
    loader.load_state_dict({**loader.state_dict(), "samples": samples})
    batches = iter(loader)
    batch = next(batches)
    seconds = perf_counter() - began
    found = {"seconds": seconds, "bytes": bytes_read() - read}
    if not batch.images.any() or not samples <= batch.positions[0] < samples + RANKS:
        raise RuntimeError("not the batch that was asked for")
    batches.close()
    return found


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far, cached or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    main()
