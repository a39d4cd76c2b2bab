"""Data sets of photographs for benchmarks: 2,048 crops of real ones as shards, made once and kept in build/bench.

The photographs are wallpapers of Debian packages. A crop has 4:3, is anywhere in its photograph, half to all of its
height, and comes down to 500 × 375 with an antialiasing filter. The JPEGs are of 4:2:0 and of two neighbouring
qualities, mixed so that their mean size is what was asked.
"""

import shutil
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from shards.build import build
from shards.manifest import SCHEMA_VERSION

WALLPAPERS = "plasma-workspace-wallpapers lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds"
KDE, BACKGROUNDS = (Path("/usr/share") / name for name in ("wallpapers", "backgrounds"))
# What of the wallpapers is a photograph, as looked at.
PHOTOGRAPHS = {
    KDE: "Autumn BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path "
         "summer_1am",
    BACKGROUNDS: "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Kleiber_by_Lukas_Baubkus Picture_0B_by_freespace "
                 "Picture_1A_by_freespace Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich "
                 "friends_by_Aitzol_Berasategi greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi "
                 "picosdeeuropa_by_Aitzol_Berasategi seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi",
    BACKGROUNDS / "mate/nature": "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings "
                                 "Wood YellowFlower",
}  # fmt: skip
VERSION = 1  # raised where what is made changes
CROPS, HEIGHT, WIDTH = 2048, 375, 500
SHARDS = 8
KEPT = Path(__file__).parents[1] / "build/bench"


def photograph_files() -> list[Path | None]:
    """Return the photographs' files; None for what is not installed."""
    return [largest(folder, name) for folder, names in PHOTOGRAPHS.items() for name in names.split()]


def largest(folder: Path, name: str) -> Path | None:
    """Return the file of a wallpaper, the largest of its sizes."""
    files = [*folder.glob(f"{name}.*"), *folder.glob(f"{name}/contents/images/*")]
    return max(files, key=lambda path: path.stat().st_size, default=None)


def photographs(kilobytes: int) -> Path:
    """Return a data set of the crops, of about so many kB each."""
    folder = KEPT / f"photographs-{kilobytes}kB-{VERSION}-{SCHEMA_VERSION}"
    if not folder.exists():
        files = photograph_files()
        if not all(files):
            sys.exit(f"the photographs are missing: apt-get install --no-install-recommends {WALLPAPERS}")
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as new:  # whole or not at all
            write(Path(new) / "images", crops(files), kilobytes)
            build(Path(new) / "images", Path(new) / "set", shard_samples=CROPS // SHARDS)
            shutil.move(Path(new) / "set", folder)
    return folder


def crops(files: list[Path]) -> list[np.ndarray]:
    """Cut as many from each photograph, up to one; uint8 [HEIGHT, WIDTH, 3] each."""
    rng = np.random.default_rng(0)
    found = []
    for number, file in enumerate(files):
        with Image.open(file) as image:
            scale = 1000 / min(image.size)  # more would only take longer
            image = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.LANCZOS)
        for _ in range(number * CROPS // len(files), (number + 1) * CROPS // len(files)):
            height = rng.uniform(0.5, 1) * min(image.height, image.width * HEIGHT / WIDTH)
            width = height * WIDTH / HEIGHT
            left, top = rng.uniform(0, 1, 2) * (image.width - width, image.height - height)
            box = (left, top, left + width, top + height)
            found.append(np.asarray(image.resize((WIDTH, HEIGHT), Image.LANCZOS, box=box)))
    return found


def write(folder: Path, images: list[np.ndarray], kilobytes: int) -> None:
    """Write JPEGs of two neighbouring qualities, so many of each that the mean size is as asked."""

    def mean(quality: int) -> float:
        return float(np.mean([len(encode(image, quality)) for image in images[::8]])) / 1e3

    higher = 1 + bisect_left(range(1, 100), kilobytes, key=mean)
    share = (kilobytes - mean(higher - 1)) / (mean(higher) - mean(higher - 1))
    (folder / "photographs").mkdir(parents=True)
    for i, image in enumerate(images):
        quality = higher - 1 + (i * 0.618 % 1 < share)
        (folder / "photographs" / f"{i:05d}.jpg").write_bytes(encode(image, quality))


def encode(image: np.ndarray, quality: int) -> bytes:
    """Return a JPEG of quality 1 to 100, 4:2:0."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, colorsubsampling="420")


def little_noise(folder: Path, count: int = 48) -> Path:
    """Make a small data set without photographs, for tests: JPEGs of noise with their spectrum."""
    write(folder / "images", list(islice(coloured_noise(), count)), 55)
    build(folder / "images", folder / "set", shard_samples=count // SHARDS)
    return folder / "set"


def coloured_noise() -> Iterator[np.ndarray]:
    """Yield uint8 [HEIGHT, WIDTH, 3]: noise whose spectrum falls with the frequency, as that of photographs does."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    frequency[0, 0] = 1
    while True:
        waves = np.fft.rfft2(rng.standard_normal((4, HEIGHT, WIDTH)), axes=(1, 2)) / frequency
        planes = np.fft.irfft2(waves[0] + 0.3 * waves[1:], (HEIGHT, WIDTH))
        yield (planes / planes.std() * 30 + 128).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
