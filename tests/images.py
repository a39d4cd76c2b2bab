"""Small real images for tests: classes that a tiny model can tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image

from shards.build import build


def make_image_folder(
    root: Path, per_class: int = 20, side: int = 20, classes: tuple = ("blue", "green", "red")
) -> Path:
    """Write ``root/CLASS/NN.png|jpg``: noise around one colour a class."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            pixels = rng.integers(0, 120, (side, side + index % 5, 3), dtype=np.uint8)
            pixels[..., label % 3] += 120
            Image.fromarray(pixels).save(folder / f"{index:03d}.{'jpg' if index % 2 else 'png'}", quality=92)
    return root


def build_image_set(root: Path, per_class: int, **options: object) -> Path:
    """Build ``root/set`` of images as above; ``options`` are those of ``build``."""
    build(make_image_folder(root / "images", per_class), root / "set", workers=1, **options)
    return root / "set"


def make_slow_images(root: Path, count: int) -> Path:
    """Write ``root/noise/NNN.png``: links to one image of noise that takes a while to be encoded anew."""
    folder = root / "noise"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root.parent / "noise.png")
    for index in range(count):
        (folder / f"{index:03d}.png").hardlink_to(root.parent / "noise.png")
    return root
