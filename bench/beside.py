"""How much the loader that runs beside a model slows the model's step: at most 3 % is wanted.

The step of a small ViT on one core (forward, backward, SGD), once short, where Python's own work counts, and once
longer; meanwhile the loader makes batches on another core as fast as one decoding thread can: more than a model
asks for, which takes a batch and lets the loader rest. "In another process" has the same loader where Python's lock is
not shared: what is slower there already is the price of two busy cores, which share caches, memory and clock. In
turns; each turn gives the median of its steps.
"""

import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from time import perf_counter

from common import arguments, report, row
from photographs import little_noise, photographs

from shards.augment import InceptionCrop
from shards.dataset import Dataset
from shards.loader import Loader

STEPS = {"short steps": (64, 1), "longer steps": (224, 2)}  # pixels a side, images
BATCH = 64  # of the loader
SPAWN = multiprocessing.get_context("spawn")
ALONE, THREADS, PROCESS = "alone", "beside the loader", "beside the loader in another process"


def main():
    args = arguments(__doc__)
    own, *others = sorted(os.sched_getaffinity(0))
    if not others:
        sys.exit("needs two cores")
    rounds, seconds = (1, 0.3) if args.quick else (7, 3)
    times = {(size, place): [] for size in STEPS for place in (ALONE, THREADS, PROCESS)}
    speeds = {place: [] for place in (THREADS, PROCESS)}
    with tempfile.TemporaryDirectory() as folder:
        data = little_noise(Path(folder)) if args.quick else photographs(55)
        os.sched_setaffinity(0, [own])
        steps = {size: make_step(*numbers) for size, numbers in STEPS.items()}
        for _ in range(rounds):
            for (size, place), values in times.items():
                with nullcontext() if place == ALONE else fed(place, data, others) as images:
                    before, began = images.value if images else 0, perf_counter()
                    values.append(1e3 * median_seconds(steps[size], seconds))
                    if images:
                        speeds[place].append((images.value - before) / (perf_counter() - began))
    os.sched_setaffinity(0, [own, *others])
    rows = [row(f"{size} {place}", "ms", values) for (size, place), values in times.items()]
    rows += [row(f"the loader meanwhile, {place}", "images/s", values) for place, values in speeds.items()]
    ratios = {f"{size} {ALONE}": median(times[size, ALONE]) / median(times[size, THREADS]) for size in STEPS}
    report("beside", rows, ratios, args.json)


def make_step(side: int, images: int) -> Callable[[], None]:
    """Return a training step of ViT-Ti/16 on noise, on one thread."""
    import torch  # here, since the process that only feeds reads this file too

    from pipeline.models import create_model

    torch.set_num_threads(1)
    model = create_model("vit_ti16", image_size=side, num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pixels, labels = torch.randn(images, 3, side, side), torch.arange(images)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def median_seconds(step: Callable[[], None], seconds: float) -> float:
    """Return the median time of a step, over so many seconds and after two steps."""
    times, end = [], perf_counter() + seconds
    while len(times) < 4 or perf_counter() < end:
        began = perf_counter()
        step()
        times.append(perf_counter() - began)
    return median(times[2:])


@contextmanager
def fed(place: str, data: Path, where: list[int]) -> Iterator[Synchronized]:
    """Keep a loader busy on the cores of the list, in a thread or a process; yields the count of its images."""
    kind = threading.Thread if place == THREADS else SPAWN.Process
    ready, stop, images = SPAWN.Event(), SPAWN.Event(), SPAWN.Value("q", 0)
    feeder = kind(target=feed, args=(data, where, ready, stop, images))
    feeder.start()
    if not ready.wait(60):
        sys.exit("the loader did not start")
    yield images
    stop.set()
    feeder.join()


def feed(data: Path, where: list[int], ready: Event, stop: Event, images: Synchronized) -> None:
    """Let a loader make batches until told to stop; its threads stay on the cores of the one that starts them."""
    os.sched_setaffinity(0, where)
    for _ in Loader(Dataset.open(data), global_batch=BATCH, transform=InceptionCrop(224), threads=1):
        images.value += BATCH
        ready.set()
        if stop.is_set():
            break


if __name__ == "__main__":
    main()
