"""How much a loader slows a model's step: at most 3 % is wanted.

The step of a small ViT on one core (forward, backward, SGD), while one thread decodes on another core. Once the loader
only runs beside the step and makes batches as fast as it can, more than a model asks for: once with short steps, where
Python's own work counts, and once with longer ones. And once, as in training, the step is fed by the loader, waits for
its batch if need be, and lets the loader rest when it is ahead; alone, the same step takes the same array again and
again. What is slower beside another process already is the price of two busy cores, which share caches, memory and
clock. In turns; each turn gives the median of its steps.
"""

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import repeat
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from common import arguments, report, row
from photographs import little_noise, photographs

from pipeline.images import to_model_input
from pipeline.models import create_model
from shards.augment import InceptionCrop
from shards.dataset import Dataset
from shards.loader import Loader
from shards.processloader import ProcessLoader

BESIDE = {"short steps": (64, 1), "longer steps": (224, 2)}  # pixels a side, images
FED = {"fed short steps": (64, 32), "fed longer steps": (224, 8)}
BATCH = 64  # of a loader that only runs beside
LOADERS = {"with a loader": Loader, "with a loader in a process": ProcessLoader}
ALONE = "alone"


def main():
    args = arguments(__doc__)
    own, *others = sorted(os.sched_getaffinity(0))
    if not others:
        sys.exit("needs two cores")
    torch.set_num_threads(1)
    rounds, seconds = (1, 0.3) if args.quick else (7, 3)
    places = (ALONE, *LOADERS)
    times = {(size, place): [] for size in (*BESIDE, *FED) for place in places}
    speeds = {place: [] for place in LOADERS}
    with tempfile.TemporaryDirectory() as folder:
        data = Dataset.open(little_noise(Path(folder)) if args.quick else photographs(55))
        os.sched_setaffinity(0, [own])
        steps = {size: make_step(*numbers) for size, numbers in (BESIDE | FED).items()}
        for _ in range(rounds):
            for (size, place), values in times.items():
                side, images = (BESIDE | FED)[size]
                same = repeat(np.full((images, side, side, 3), 99, dtype=np.uint8))
                if place == ALONE:
                    values.append(1e3 * median_seconds(steps[size], same, seconds))
                elif size in FED:
                    with batches(LOADERS[place], data, others, images, side) as fed:
                        os.sched_setaffinity(0, [own])
                        values.append(1e3 * median_seconds(steps[size], fed, seconds))
                else:
                    with busy(LOADERS[place], data, others) as made:
                        before, began = len(made), perf_counter()
                        values.append(1e3 * median_seconds(steps[size], same, seconds))
                        speeds[place].append(BATCH * (len(made) - before) / (perf_counter() - began))
    os.sched_setaffinity(0, [own, *others])
    rows = [row(f"{size} {place}", "ms", values) for (size, place), values in times.items()]
    rows += [row(f"loader beside, {place}", "images/s", values) for place, values in speeds.items()]
    ratios = {
        f"{size}, {place}": median(times[size, ALONE]) / median(times[size, place])
        for size, place in times
        if place != ALONE
    }
    report("beside", rows, ratios, args.json)


def make_step(side: int, images: int) -> Callable[[np.ndarray], None]:
    """Return a training step of ViT-Ti/16 on uint8 [images, side, side, 3], on one thread."""
    model = create_model("vit_ti16", image_size=side, num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.arange(images)

    def step(pixels: np.ndarray) -> None:
        loss = torch.nn.functional.cross_entropy(model(to_model_input(pixels, torch.device("cpu"))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def median_seconds(step: Callable[[np.ndarray], None], fed: Iterator[np.ndarray], seconds: float) -> float:
    """Return the median time of a step and of getting its images, over so many seconds and after two steps."""
    times, end = [], perf_counter() + seconds
    while len(times) < 4 or perf_counter() < end:
        began = perf_counter()
        step(next(fed))
        times.append(perf_counter() - began)
    return median(times[2:])


@contextmanager
def batches(
    kind: type[Loader] | type[ProcessLoader], data: Dataset, where: list[int], batch: int, side: int
) -> Iterator[Iterator[np.ndarray]]:
    """Yield the images of a new loader, which decodes on the cores of the list; this thread is left on them, too."""
    os.sched_setaffinity(0, where)  # threads and processes stay where the one is that starts them
    loader = kind(data, global_batch=batch, transform=InceptionCrop(side), threads=1)
    with closing(iter(loader)) as found:
        next(found)
        yield (batch.images for batch in found)
    if kind is ProcessLoader:
        loader.close()


@contextmanager
def busy(kind: type[Loader] | type[ProcessLoader], data: Dataset, where: list[int]) -> Iterator[list[int]]:
    """Keep a loader busy on the cores of the list; yields a list that grows with each batch."""
    made, stop = [], threading.Event()

    def work() -> None:
        with batches(kind, data, where, BATCH, 224) as found:
            for images in found:
                made.append(len(images))
                if stop.is_set():
                    break

    thread = threading.Thread(target=work)
    thread.start()
    while not made:
        thread.join(0.01)
        if not thread.is_alive():
            sys.exit("the loader did not start")
    yield made
    stop.set()
    thread.join()


if __name__ == "__main__":
    main()
