"""One rank: under every engine and stage, steps that a guard holds back, and one whose gradient is not a number.

worker_guard.py    tells for each engine and optimizer what the guard was asked, which steps were applied, and a digest
                   of weights, states and step count after each, and after a run that never saw the steps held back
"""

import hashlib
import json

import torch

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check
from shards.ending import end_process

MODEL = {"name": "vit_ti16", "image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
ENGINES = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("accelerate", 0)]
GLOBAL_BATCH = 4
HELD, NAN, GOOD = (0, 2), 3, (1, 4)  # step numbers: by the guard, by itself, not


def main() -> None:
    found = {}
    for kind, stage in ENGINES:
        for optimizer in ("adamw", "sgd"):
            asked = []

            def guard(loss, norm, asked=asked):
                asked.append((float(loss), float(norm)))
                return torch.tensor(len(asked) - 1 in HELD)

            settings = settings_of(kind, stage, optimizer)
            engine = new_engine(settings, guard)
            digests, applied, losses = [digest(engine)], [], []
            for number in range(5):
                done = take(engine, settings, number)
                applied.append(bool(done.applied))
                losses.append(float(done.loss))
                digests.append(digest(engine))
            engine = new_engine(settings, None)
            for number in GOOD:
                take(engine, settings, number)
            one = {"asked": asked, "applied": applied, "losses": losses, "digests": digests, "without": digest(engine)}
            found[f"{kind}-{stage}-{optimizer}"] = one
    print(json.dumps(found))


def settings_of(kind: str, stage: int, optimizer: str) -> TrainSettings:
    return check(TrainSettings, {
        "duration": "1 epoch", "global_batch": GLOBAL_BATCH, "data": {"train": "-"}, "model": {"name": "vit_ti16"},
        "optim": {"name": optimizer, "clip": 1.0, "weight_decay": 0.1, "layer_decay": 0.5},
        "engine": {"kind": kind, "zero_stage": stage},
    }, "test")  # fmt: skip


def new_engine(settings: TrainSettings, guard):
    with torch.device("meta"):
        template = create_model(**MODEL, num_classes=5, seed=None)

    def value_of(name: str, shape: tuple) -> torch.Tensor:
        value = initial_value(template, name, shape, seed=0)
        return value + 0.05 if name.startswith("head.") else value  # a zero head would pass no gradient on

    return create_engine(lambda: create_model(**MODEL, num_classes=5, seed=None), value_of, settings, guard)


def take(engine, settings: TrainSettings, number: int):
    rank, world_size = distributed.rank(), distributed.world_size()
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)
    if number == NAN:
        images[0, 0, 0, 0] = torch.nan  # on one rank alone
    objective = Supervised(settings, None, 5)
    batch = images[rank::world_size], labels[rank::world_size]
    return engine.step([batch], lambda model, batch: objective.loss(model, *batch), lr=0.01)


def digest(engine) -> str:
    found = hashlib.sha256()
    for kind, name, start, tensor in engine.pieces():
        found.update(f"{kind}/{name}@{start}".encode() + tensor.detach().contiguous().numpy().tobytes())
    for name, tensor in engine.weights():  # what the model runs with
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    distributed.start()
    main()
    distributed.finish()
    end_process(0)
