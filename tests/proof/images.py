"""The images of the proof, 1 % of them broken, as shards in a local folder."""

import random
from pathlib import Path

from shards.build import build
from tests.images import make_image_folder

PER_CLASS = 1000  # of three classes
BROKEN = 30
TABLE = b"\xff\xc4"  # of a Huffman code in a JPEG: what is wrong in it shows when it is decoded, not before


def make_shards(folder: Path, seed: int) -> tuple[Path, set[str]]:
    """Make images, break those that a seed draws, and build shards.

    Returns:
        The folder of the data set, and the keys of the broken images.
    """
    images = make_image_folder(folder / "images", PER_CLASS)
    whole = sorted(images.glob("*/*.jpg"))
    broken = random.Random(seed).sample(whole, BROKEN)
    for path in broken:
        data = path.read_bytes()
        at = data.index(TABLE) + 5  # after mark, length and number: how many codes there are of each length
        path.write_bytes(data[:at] + bytes([255] * 16) + data[at + 16 :])
    build(images, folder / "data", workers=1, shard_samples=256)
    return folder / "data", {path.relative_to(images).with_suffix("").as_posix() for path in broken}
