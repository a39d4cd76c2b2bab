"""One rank: train a tiny model on fixed data, perhaps from a checkpoint; tell losses, norms and digests of weights.

worker.py ENGINE STAGE PRECISION OPTIMIZER STEPS FOLDER [resume or ""] [MODEL]
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check
from shards.ending import end_process

TINY = {"image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
MODELS = {
    # Parameters that ZeRO 3 must gather for others than the layer that has them, or that are no layer's.
    "vit": {"name": "vit_ti16", **TINY, "registers": 2, "position": "relative", "position_at": "shared"},
    "hybrid": {"name": "r50_vit_b16", **TINY, "patch_size": 1, "backbone": [1, 2], "backbone_width": 32},
    "axial": {"name": "axial_vit_b16", **TINY},
    "bit": {"name": "bit_r50x1", "image_size": 16, "units": [1, 2], "width": 32, "num_classes": 5},
}
GLOBAL_BATCH = 12


def main(
    kind: str, stage: str, precision: str, optimizer: str, steps: str, folder: str, resume: str = "", name: str = "vit"
) -> None:
    rank, world_size, model = distributed.rank(), distributed.world_size(), MODELS[name]
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": GLOBAL_BATCH, "micro_batch": 2, "data": {"train": "-"},
        "model": {"name": "vit_ti16"}, "optim": {"name": optimizer, "clip": 1.0, "weight_decay": 0.1},
        "engine": {"kind": kind, "zero_stage": int(stage), "precision": precision},
    }, "test")  # fmt: skip
    with torch.device("meta"):
        template = create_model(**model, seed=None)
    shapes = {name: tuple(p.shape) for name, p in template.named_parameters()}

    def value_of(parameter: str, shape: tuple) -> torch.Tensor:
        value = initial_value(template, parameter, shape, seed=0)
        return value + 0.05 if parameter.startswith("head.") else value  # a zero head would pass no gradient on

    engine = create_engine(lambda: create_model(**model, seed=None), value_of, settings)
    first = digest(engine.weights())
    start = 0
    if resume:
        loaded = checkpoint.newest(Path(folder))
        engine.load(loaded.read)
        start = loaded.samples // GLOBAL_BATCH
    objective = Supervised(settings, None, 5)
    losses, norms = [], []
    for step in range(start, start + int(steps)):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)[rank::world_size]
        labels = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)[rank::world_size]
        batches = list(zip(images.split(2), labels.split(2), strict=True))
        done = engine.step(batches, lambda model, batch: objective.loss(model, *batch), lr=0.01)
        losses.append(float(done.loss))
        norms.append(float(done.grad_norm))
    checkpoint.save(Path(folder), (start + int(steps)) * GLOBAL_BATCH, engine.pieces(), shapes, {"val": None})
    print(json.dumps({"first": first, "losses": losses, "norms": norms, "weights": digest(engine.weights())}))


def digest(weights) -> str:
    found = hashlib.sha256()
    for name, tensor in weights:
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
