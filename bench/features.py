"""Features of images: ours against transformers' ViT behind a DataLoader, end to end and the preprocessing alone.

Both make of the same JPEGs squares of 224 pixels in [-1, 1] and run the same ViT-S/16 (B/16 on a GPU), random, without
a head, in turns, each in a process of its own. transformers reads files through its ViTImageProcessor (Pillow), with a
worker of the DataLoader a core; ours reads shards with as many threads. Last, the closed-form few-shot fit of the
paper's size: 25 shots of 1,000 classes, 1,280 features, and the scores of 10,000 more.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median

from common import arguments, cores, report, row
from photographs import little_noise, photographs

BATCH, SIZE, ROUNDS = 32, 224, 5
QUICK = {"model": "vit_ti16", "images": 8, "batch": 4, "few": (20, 5, 64)}


def main():
    args = arguments(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        shards = little_noise(Path(folder)) if args.quick else photographs(55)
        case = {**QUICK, "shards": str(shards), "files": str(write_files(shards, Path(folder) / "files", args.quick))}
        if not args.quick:
            case |= {"model": default_model(), "images": 256, "batch": BATCH, "few": (1000, 25, 1280)}
        what = ("end to end", "preprocessing")
        speeds = {(name, each): [] for each in what for name in ("patchmill", "transformers")}
        few = []
        for _ in range(1 if args.quick else ROUNDS):
            for (name, each), values in speeds.items():
                values.append(run(name, {**case, "what": each}))
            few.append(run("few-shot", case))
    rows = [row(f"{name}, {each}", "images/s", values) for (name, each), values in speeds.items()]
    classes, shots, width = case["few"]
    rows.append(row(f"few-shot fit: {shots} shots, {classes} classes, {width} features", "s", few))
    ratios = {
        f"transformers, {each}": median(
            ours / theirs for ours, theirs in zip(speeds["patchmill", each], speeds["transformers", each], strict=True)
        )
        for each in what
    }
    report("features", rows, ratios, args.json)


def default_model() -> str:
    """Return the model that the machine can run many images through."""
    import torch

    return "vit_b16" if torch.cuda.is_available() else "vit_s16"


def write_files(shards: Path, folder: Path, quick: bool) -> Path:
    """Write a data set's images as files of a folder."""
    from shards.dataset import Dataset

    folder.mkdir()
    dataset = Dataset.open(shards)
    for place in range(min(len(dataset), 8 if quick else len(dataset))):
        (folder / f"{place:06d}").write_bytes(dataset[place].image)  # Pillow looks at what is inside
    return folder


def run(name: str, case: dict) -> float:
    """Run a contestant in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, name, json.dumps(case)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.splitlines()[-1])


# ---- what runs in the processes


def images_per_second(batches, model, case: dict, device) -> float:
    """Return the speed of a model over batches [n, 3, H, W] of a loader, the first of them not counted."""
    import torch

    batches, wanted = iter(batches), case["images"] if case["what"] == "end to end" else 4 * case["images"]
    with torch.inference_mode():
        for number, images in enumerate(islice(batches, 1 + -(-wanted // case["batch"]))):
            if number == 1:
                began, done = time.perf_counter(), 0
            found = model(images.to(device)) if case["what"] == "end to end" else images
            if number:
                done += len(found)
        found[0].flatten()[0].item()  # waits for a GPU
    return done / (time.perf_counter() - began)


def patchmill(case: dict) -> float:
    """Ours: shards, our loader, our model."""
    import torch

    from pipeline.images import to_model_input
    from pipeline.models import create_model
    from pipeline.prefetch import prefetched
    from shards.augment import Resize
    from shards.dataset import Dataset
    from shards.evaluation import EvaluationLoader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model(case["model"], num_classes=0, seed=0).eval().to(device)
    loader = EvaluationLoader(Dataset.open(case["shards"]), case["batch"], transform=Resize(SIZE), threads=cores())

    def batches():
        while True:  # a little set is gone through more than once
            for (images,) in prefetched(iter(loader), lambda part: (to_model_input(part.images, device),), device):
                yield images

    return images_per_second(batches(), model, case, device)


def transformers(case: dict) -> float:
    """Theirs: files, ViTImageProcessor, a DataLoader, ViTModel."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader
    from torch.utils.data import Dataset as TorchDataset
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    from pipeline.models.vit import SETTINGS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    numbers = SETTINGS[case["model"]]
    model = ViTModel(ViTConfig(
        hidden_size=numbers["embed_dim"], num_hidden_layers=numbers["depth"], num_attention_heads=numbers["num_heads"],
        intermediate_size=4 * numbers["embed_dim"], patch_size=numbers["patch_size"], image_size=SIZE,
        hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    ), add_pooling_layer=False).eval().to(device)  # fmt: skip
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    files = sorted(Path(case["files"]).iterdir())

    class Files(TorchDataset):
        def __len__(self):
            return 1_000_000  # again and again, so that workers start once

        def __getitem__(self, place):
            image = Image.open(files[place % len(files)]).convert("RGB")
            return processor(image, return_tensors="pt")["pixel_values"][0]

    loader = DataLoader(Files(), case["batch"], num_workers=cores(), pin_memory=device.type == "cuda")
    return images_per_second(loader, lambda images: model(images).last_hidden_state[:, 0], case, device)


def few_shot(case: dict) -> float:
    """Return the seconds of a fit and of scoring 10,000 samples."""
    import numpy as np

    from pipeline.evaluate.fewshot import fit

    classes, shots, width = case["few"]
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), shots)
    features = rng.standard_normal((len(labels), width), dtype=np.float32)
    test = rng.standard_normal((10_000, width), dtype=np.float32)
    began = time.perf_counter()
    fit(features, labels, classes).accuracy(test, rng.integers(0, classes, len(test)))
    return time.perf_counter() - began


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        contestant = {"patchmill": patchmill, "transformers": transformers, "few-shot": few_shot}[sys.argv[1]]
        print(contestant(json.loads(sys.argv[2])), flush=True)
        os._exit(0)  # loaders that are not at their end
    main()
