"""Whether the loader's memory stays flat: resident megabytes after each of 20 epochs, local and over HTTP by chunks.

2,048 photographs of 55 kB, batches of 64, as many threads as cores, each kind in a process of its own. The growth is
from the median of epochs 2 to 6 to that of the last five: the first epoch fills what is kept (rows, threads' buffers).
"""

import gc
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

from common import arguments, cores, memory, report, row
from photographs import little_noise, photographs
from webserver import serve

from shards.augment import InceptionCrop
from shards.dataset import Dataset
from shards.loader import Loader

EPOCHS, BATCH = 20, 64


def main():
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        data = little_noise(Path(folder)) if args.quick else photographs(55)
        with serve(data) as server:
            found = {"local": fresh(str(data)), "HTTP": fresh(server.url)}
    rows = [row(f"{place}, resident after epochs 2 to {EPOCHS}", "MB", each[1:]) for place, each in found.items()]
    rows += [row(f"{place}, growth", "MB", [median(each[-5:]) - median(each[1:6])]) for place, each in found.items()]
    report("memory", rows, {}, args.json)


def fresh(url: str) -> list[float]:
    """Measure in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(resident, url).result()


def resident(url: str) -> list[float]:
    """Return the MB that the process holds after each epoch."""
    dataset = Dataset.open(url)
    loader = Loader(dataset, global_batch=BATCH, transform=InceptionCrop(224), threads=cores())
    batches, found = iter(loader), []
    for epoch in range(1, EPOCHS + 1):
        while loader.samples < epoch * len(dataset):
            next(batches)
        gc.collect()
        found.append(memory("VmRSS"))
    batches.close()
    return found


if __name__ == "__main__":
    main()
