"""Write the drawings of examples/clipart in the layout of CIFAR-10's binary files: ten classes, 32 x 32 pixels.

    python examples/suite/as_cifar.py [OUT]        default: cifar-10-batches-bin beside this file

For who has not CIFAR-10 at hand. The test images are those that plan.toml holds out: nothing of them is pre-trained on.
"""

import sys
import tempfile
import tomllib
from pathlib import Path

import numpy as np
from PIL import Image

from shards.atomic import commit_folder, partial_folder
from shards.build import build
from shards.dataset import Dataset
from shards.decode import decode

HERE = Path(__file__).parent
DRAWINGS = HERE.parent / "clipart" / "images"
SIDE, BATCHES = 32, 5


def write(drawings: Path, out: Path) -> None:
    """Write ``data_batch_1.bin`` to ``_5``, ``test_batch.bin`` and ``batches.meta.txt``: all of them, or nothing."""
    if out.exists():
        sys.exit(f"{out} is there already; remove it, or name another folder")
    with tempfile.TemporaryDirectory() as folder:
        # A hash of its name puts an image into its part: into the same one as in the plan.
        split = tomllib.loads((HERE / "plan.toml").read_text())["stage"][0]["set"]["split"]
        build(drawings, folder, split=split, workers=1)
        parts = {part: Dataset.open(Path(folder) / part) for part in ("train", "dev", "val")}
        rows = {part: [_row(dataset[place]) for place in range(len(dataset))] for part, dataset in parts.items()}
    partial = partial_folder(out)
    train = rows["train"] + rows["dev"]
    for number in range(BATCHES):
        (partial / f"data_batch_{number + 1}.bin").write_bytes(b"".join(train[number::BATCHES]))
    (partial / "test_batch.bin").write_bytes(b"".join(rows["val"]))
    (partial / "batches.meta.txt").write_text("\n".join(parts["train"].classes) + "\n")
    commit_folder(partial, out)


def _row(sample) -> bytes:
    """Return a sample as CIFAR-10 has it: its label, then all red, all green, all blue."""
    image = Image.fromarray(decode(sample.image, sample.key)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return bytes([sample.labels[0]]) + np.asarray(image).transpose(2, 0, 1).tobytes()


if __name__ == "__main__":
    write(DRAWINGS, Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "cifar-10-batches-bin")
