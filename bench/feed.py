"""One contestant of bench/loader.py, in a process of its own: ``feed.py CONTESTANT FOLDER --cores N --seconds N``.

Prints {"images/s": ..., "shape": [...], "mean": ...} as JSON. Runs in Patchmill's environment or in the peers'; so what
only one of them has is imported by the function that needs it. All do the same work, endlessly, on as many cores as
told, and are held to those: read tars, decode, take an Inception crop of 5 to 100 % of the area, resize it to 224,
mirror half of them, and batch 64 as uint8. The law of the crop is torchvision's and DALI's for all of them (area
uniform, aspect ratio log-uniform) but for ``patchmill, own crops``.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from time import perf_counter

import numpy as np

BATCH, SIZE = 64, 224
AREA, ASPECT = (0.05, 1.0), (3 / 4, 4 / 3)
WARM_UP = 8  # batches


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    batches = CONTESTANTS[args.contestant](args.folder, args.cores)
    first = [np.asarray(images) for images in islice(batches, WARM_UP)]
    count, began = 0, perf_counter()
    while perf_counter() - began < args.seconds:
        next(batches)
        count += BATCH
    speed = count / (perf_counter() - began)
    shape, kind = first[0].shape, str(first[0].dtype)
    print(json.dumps({"images/s": speed, "shape": shape, "dtype": kind, "mean": float(np.mean(first))}))


def patchmill(folder: Path, cores: int, law: str = "torchvision", shrink: bool = False) -> Iterator[np.ndarray]:
    """Our loader; bilinear without antialiasing, as in the paper's code."""
    from shards.augment import InceptionCrop, draws
    from shards.dataset import Dataset
    from shards.loader import Loader

    class TorchvisionCrop(InceptionCrop):
        """The same, by the law of torchvision and DALI."""

        def box(self, height: int, width: int, key: tuple[int, int, int]) -> tuple[int, int, int, int]:
            draw = draws(key)
            next(draw)  # the mirror's
            low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
            for _ in range(10):
                area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * next(draw))
                ratio = math.exp(low + (high - low) * next(draw))
                w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if 0 < w <= width and 0 < h <= height:
                    return int(next(draw) * (height - h + 1)), int(next(draw) * (width - w + 1)), h, w
            # The middle, the largest part whose aspect ratio is allowed.
            w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
            return (height - h) // 2, (width - w) // 2, h, w

    kind = {"torchvision": TorchvisionCrop, "own": InceptionCrop}[law]
    transform = kind(SIZE, AREA, ASPECT, shrink=shrink)
    loader = Loader(Dataset.open(folder), global_batch=BATCH, transform=transform, threads=cores)
    return (batch.images for batch in loader)


def webdataset(folder: Path, cores: int) -> Iterator:
    """Stock webdataset with Pillow and torchvision, as in its documentation; Pillow's bilinear antialiases."""
    sys.path.append(str(Path(__file__).parents[1] / "tests/peers"))
    from read import torchvision_without_operators

    torchvision_without_operators()
    import webdataset
    from torch.utils.data import DataLoader
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, AREA, ASPECT),
            transforms.RandomHorizontalFlip(),
            np.asarray,  # quicker than a tensor, and the same bytes
        ]
    )
    dataset = (
        webdataset.WebDataset(tars(folder), shardshuffle=False, resampled=True)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transform, int)
        .batched(BATCH)
    )
    return (images for images, _ in DataLoader(dataset, batch_size=None, num_workers=cores))


def dali(folder: Path, cores: int) -> Iterator:
    """NVIDIA DALI on the CPU, its decoder fused with the crop; bilinear without antialiasing."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, seed=0)
    def pipeline():
        images, labels = fn.readers.webdataset(
            paths=tars(folder), ext=["jpg", "cls"], random_shuffle=True, initial_fill=1000
        )
        images = fn.decoders.image_random_crop(
            images, device="cpu", output_type=types.RGB, random_area=list(AREA), random_aspect_ratio=list(ASPECT)
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=False)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    pipe = pipeline()
    pipe.build()
    while True:
        images, _ = pipe.run()
        yield images.as_tensor()


def tars(folder: Path) -> list[str]:
    """Return the paths of the tars in order."""
    return sorted(str(path) for path in (folder / "shards").glob("*.tar"))


CONTESTANTS = {
    "patchmill": patchmill,
    "patchmill, scaled decoding": lambda folder, cores: patchmill(folder, cores, shrink=True),
    "patchmill, own crops": lambda folder, cores: patchmill(folder, cores, law="own"),
    "webdataset": webdataset,
    "dali": dali,
}

if __name__ == "__main__":
    main()
