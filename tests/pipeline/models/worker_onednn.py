"""One rank: two steps of a tiny model under ZeRO 3, with oneDNN's linear layers and PyTorch's: losses and norms."""

import json
import math

import torch

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model, onednn
from pipeline.models.initial import initial_value
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check
from shards.ending import end_process

MODEL = {"name": "vit_ti16", "image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def main() -> None:
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": 4 * distributed.world_size(), "data": {"train": "-"},
        "model": {"name": "vit_ti16"}, "engine": {"kind": "deepspeed", "zero_stage": 3},
    }, "test")  # fmt: skip
    with torch.device("meta"):
        template = create_model(**MODEL, num_classes=5, seed=None)
    objective, found = Supervised(settings, None, 5), []
    for least in (0, math.inf):
        onednn.LEAST = least
        engine = create_engine(
            lambda: create_model(**MODEL, num_classes=5, seed=None),
            lambda name, shape: initial_value(template, name, shape, seed=0) + 0.01, settings,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(distributed.rank())
        for _ in range(2):
            batch = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(0, 5, (4,), generator=generator)
            done = engine.step([batch], lambda model, batch: objective.loss(model, *batch), lr=0.01)
            found.append([float(done.loss), float(done.grad_norm)])
    print(json.dumps(found))


if __name__ == "__main__":
    distributed.start()
    main()
    distributed.finish()
    end_process(0)
