"""Images a second of our loader and of stock webdataset with Pillow, on the same shards, in turns.

Both read, decode JPEGs of 500 × 375, take an Inception crop by the same law to 224 pixels, mirror half of
them and batch, with as many threads or worker processes as there are cores. Pillow's bilinear resize
antialiases where it shrinks, as everyone's does who uses it; ours does not, as in the paper's code.
"""

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np
import psutil
import simplejpeg
import torch
import webdataset
from common import arguments, cores, report, row
from PIL import Image

from shards.augment import InceptionCrop, draws, inception_box
from shards.build import build
from shards.dataset import Dataset
from shards.loader import Loader

BATCH, SIZE = 64, 224


def main():
    args = arguments(__doc__)
    images, batches, rounds = (96, 4, 3) if args.quick else (768, 40, 5)
    contestants = {"patchmill": ours, "webdataset": stock}
    speed, per_core = ({name: [] for name in contestants} for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "set"
        synthesise(Path(folder) / "images", images)
        build(Path(folder) / "images", data, shard_samples=images // 8)
        for _ in range(rounds):
            for name, contestant in contestants.items():
                seconds, cpu = timed(contestant(data), batches)
                speed[name].append(BATCH * batches / seconds)
                per_core[name].append(BATCH * batches / cpu)
    rows = [row(name, "images/s", speed[name]) for name in contestants]
    rows += [row(f"{name}, per core", "images/CPU s", per_core[name]) for name in contestants]
    report("loader", rows, {"webdataset": rows[0].value / rows[1].value}, args.json)


def synthesise(folder: Path, images: int) -> None:
    """Write JPEGs of 1/f noise, whose spectrum is that of photographs: 4:2:0, 50 to 60 kB each."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.rfftfreq(500)[None])
    frequency[0, 0] = 1
    (folder / "noise").mkdir(parents=True)
    for i in range(images):
        noise = np.fft.rfft2(rng.standard_normal((375, 500)))
        tint = np.fft.rfft2(rng.standard_normal((3, 375, 500)), axes=(1, 2))
        planes = np.fft.irfft2((noise + 0.3 * tint) / frequency, (375, 500), axes=(1, 2))
        pixels = (planes / planes.std() * 30 + 128).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=75, colorsubsampling="420")
        (folder / "noise" / f"{i:05d}.jpg").write_bytes(data)


def ours(data: Path) -> Iterator:
    """Batches of our loader."""
    transform = InceptionCrop(SIZE)
    return iter(Loader(Dataset.open(data), global_batch=BATCH, transform=transform, threads=cores()))


class PillowCrop:
    """Inception crop by our law with Pillow, the usual way."""

    def __init__(self):
        self.position = 0

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Turn an image into uint8 [224, 224, 3]."""
        self.position += 1
        draw = draws((0, 0, self.position))
        top, left, h, w = inception_box(image.height, image.width, draw)
        image = image.resize((SIZE, SIZE), Image.BILINEAR, box=(left, top, left + w, top + h))
        if next(draw) < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        return np.asarray(image)


def stock(data: Path) -> Iterator:
    """Batches of webdataset as its own documentation builds them, endless."""
    tars = [str(tar) for tar in sorted((data / "shards").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=False, resampled=True)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(PillowCrop(), int)
        .batched(BATCH)
    )
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=cores()))


def timed(batches: Iterator, count: int) -> tuple[float, float]:
    """Return wall seconds and CPU seconds, with all child processes, of ``count`` batches once it runs."""
    for batch in islice(batches, 4):
        assert batch[0].shape == (BATCH, SIZE, SIZE, 3)
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    cpu, began = cpu_seconds(family), perf_counter()
    for _ in islice(batches, count):
        pass
    return perf_counter() - began, cpu_seconds(family) - cpu


def cpu_seconds(family: list[psutil.Process]) -> float:
    """Return the CPU time, user and system, that processes have used."""
    return sum(sum(process.cpu_times()[:2]) for process in family)


if __name__ == "__main__":
    main()
