"""Features of images: ours against transformers' ViT behind a DataLoader, end to end and the preprocessing alone.

Both make of the same JPEGs squares of 224 pixels in [-1, 1] and run the same ViT-S/16 (B/16 on a GPU), random, without
a head, in turns, each in a process of its own. transformers reads files with Pillow and its fast image processor
(torchvision), with a worker of the DataLoader a core; ours reads shards with as many threads. Last, the closed-form
few-shot fit of the paper's size: 25 shots of 1,000 classes, 1,280 features, and the scores of 10,000 more. See
extract.py for what each of them does.
"""

import json
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from common import arguments, report, row
from peers import PYTHON, is_installed, run_script
from photographs import little_noise, photographs

from pipeline.models.vit import SETTINGS
from shards.dataset import Dataset

ROUNDS = 5
NEEDED = ("transformers", "torchvision")  # in the peers' environment


def main():
    args = arguments(__doc__)
    sizes = (20, 5, 64) if args.quick else (1000, 25, 1280)  # classes, shots, features
    present = ["patchmill", *(["transformers"] if is_installed(*NEEDED) else [])]
    with tempfile.TemporaryDirectory() as folder:
        shards = little_noise(Path(folder)) if args.quick else photographs(55)
        data = {"shards": str(shards), "files": str(write_files(shards, Path(folder) / "files"))}
        cases = {what: data | case for what, case in (quick_cases() if args.quick else full_cases()).items()}
        speeds = {(name, what): [] for what in cases for name in present}
        few = []
        for _ in range(1 if args.quick else ROUNDS):
            for (name, what), values in speeds.items():
                values.append(run(name, cases[what])["images/s"])
            few.append(run("few-shot", {"few": sizes})["seconds"])
    rows = [row(f"{name}, {what}", "images/s", values) for (name, what), values in speeds.items()]
    classes, shots, width = sizes
    rows.append(row(f"few-shot fit: {shots} shots, {classes} classes, {width} features", "s", few))
    ratios = {f"transformers, {what}": ratio(speeds, what) if len(present) > 1 else None for what in cases}
    report("features", rows, ratios, args.json)


def full_cases() -> dict[str, dict]:
    """Return what is measured: a model that the machine can run many images through, and none."""
    model, images = ("vit_b16", 8192) if torch.cuda.is_available() else ("vit_s16", 256)
    return {
        "end to end": {"model": model, "numbers": SETTINGS[model], "images": images, "batch": 32},
        "preprocessing": {"model": None, "images": 4096, "batch": 32},
    }


def quick_cases() -> dict[str, dict]:
    return {what: case | {"images": 8, "batch": 4} for what, case in full_cases().items()}


def ratio(speeds: dict[tuple[str, str], list[float]], what: str) -> float:
    """Return how many times as fast ours is: the median of the rounds."""
    return median(a / b for a, b in zip(speeds["patchmill", what], speeds["transformers", what], strict=True))


def write_files(shards: Path, folder: Path) -> Path:
    """Write a data set's images as files of a folder."""
    folder.mkdir()
    dataset = Dataset.open(shards)
    for place in range(len(dataset)):
        (folder / f"{place:06d}").write_bytes(dataset[place].image)  # Pillow looks at what is inside
    return folder


def run(name: str, case: dict) -> dict:
    """Run a contestant in a process of its own."""
    python = PYTHON if name == "transformers" else sys.executable
    return run_script(python, "extract.py", name, json.dumps(case))


if __name__ == "__main__":
    main()
