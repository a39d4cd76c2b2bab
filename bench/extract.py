"""One contestant of bench/features.py, in a process of its own: ``extract.py CONTESTANT CASE``, the case as JSON.

Prints {"images/s": ...} or {"seconds": ...} as JSON. Runs in Patchmill's environment or in the peers'; so what only one
of them has is imported by the function that needs it. Both extractors make batches of float32 [n, 3, 224, 224] in
[-1, 1] of the same JPEGs, and where the case has a model run them through a random ViT of its shape, without a head.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from common import cores
from torch import Tensor

SIZE = 224
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images_per_second(batches: Iterator[Tensor], features: Callable[[Tensor], Tensor] | None, case: dict) -> float:
    """Return the speed of batches [n, 3, H, W] of a loader, and of a model's features of them if there is one.

    As many batches as there are cores are not counted: a peer's workers bring the first of each at the same time.
    """
    with torch.inference_mode():
        for warm_up, wanted in ((True, cores()), (False, -(-case["images"] // case["batch"]))):
            began, done = time.perf_counter(), 0
            for images in islice(batches, wanted):
                found = features(images.to(DEVICE)) if features else images
                done += len(found)
            found.flatten()[0].item()  # waits for a GPU
            if not warm_up:
                return done / (time.perf_counter() - began)


def patchmill(case: dict) -> dict:
    """Ours: shards, our loader, our model."""
    from pipeline.images import to_model_input
    from pipeline.models import create_model
    from pipeline.prefetch import prefetched
    from shards.augment import Resize
    from shards.dataset import Dataset
    from shards.evaluation import EvaluationLoader

    loader = EvaluationLoader(Dataset.open(case["shards"]), case["batch"], transform=Resize(SIZE), threads=cores())

    def batches() -> Iterator[Tensor]:
        while True:  # a little set is gone through more than once
            for (images,) in prefetched(iter(loader), lambda part: (to_model_input(part.images, DEVICE),), DEVICE):
                yield images

    model = create_model(case["model"], num_classes=0, seed=0).eval().to(DEVICE) if case["model"] else None
    return {"images/s": images_per_second(batches(), model, case)}


def transformers(case: dict) -> dict:
    """Theirs: files, the fast image processor, a DataLoader with a worker a core, ViTModel."""
    sys.path.append(str(Path(__file__).parents[1] / "tests/peers"))
    from read import torchvision_without_operators

    torchvision_without_operators()
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from transformers import ViTConfig, ViTImageProcessorFast, ViTModel

    processor = ViTImageProcessorFast(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    files = sorted(Path(case["files"]).iterdir())

    class Files(Dataset):
        def __len__(self):
            return 1_000_000  # again and again, so that workers start once

        def __getitem__(self, place):
            image = Image.open(files[place % len(files)]).convert("RGB")
            return processor(image, return_tensors="pt")["pixel_values"][0]

    features = None
    if case["model"]:
        numbers = case["numbers"]
        config = ViTConfig(
            hidden_size=numbers["embed_dim"], num_hidden_layers=numbers["depth"],
            num_attention_heads=numbers["num_heads"], intermediate_size=4 * numbers["embed_dim"],
            patch_size=numbers["patch_size"], image_size=SIZE, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
        )  # fmt: skip
        model = ViTModel(config, add_pooling_layer=False).eval().to(DEVICE)
        features = lambda images: model(images).last_hidden_state[:, 0]  # noqa: E731
    loader = DataLoader(Files(), case["batch"], num_workers=cores(), pin_memory=DEVICE.type == "cuda")
    return {"images/s": images_per_second(iter(loader), features, case)}


def few_shot(case: dict) -> dict:
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
    return {"seconds": time.perf_counter() - began}


CONTESTANTS = {"patchmill": patchmill, "transformers": transformers, "few-shot": few_shot}

if __name__ == "__main__":
    print(json.dumps(CONTESTANTS[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
    os._exit(0)  # loaders that are not at their end
