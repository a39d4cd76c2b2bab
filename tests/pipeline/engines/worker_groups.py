"""One rank: a checkpoint of one group of parameters goes on in many, under every engine and stage in turn.

worker_groups.py FOLDER plain    two steps in one group, saved in FOLDER/plain; then under each engine one step in many
                                 groups from there, saved in FOLDER/ENGINE
worker_groups.py FOLDER many     under each engine one more step, from what the others saved
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check
from shards.ending import end_process

MODEL = {
    "name": "vit_ti16",
    "image_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 3,
    "num_classes": 5,
}
ENGINES = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("accelerate", 0)]
GLOBAL_BATCH, RATE, DECAY, LAYER_DECAY = 12, 0.01, 0.1, 0.5


def main(folder: str, source: str) -> None:
    with torch.device("meta"):
        template = create_model(**MODEL, seed=None)
    if source == "plain":
        run(template, ("accelerate", 0), Path(folder) / "plain", None, 2, many=False)
    found = {"reference": reference(template)}
    for number, engine in enumerate(ENGINES):
        start = Path(folder) / ("plain" if source == "plain" else name_of(ENGINES[number - 1]))
        out = Path(folder) / (name_of(engine) if source == "plain" else "end")
        found[name_of(engine)] = run(template, engine, out, start, 1, many=True)
    print(json.dumps(found))


def name_of(engine: tuple[str, int]) -> str:
    return f"{engine[0]}-{engine[1]}"


def value_of(template, name: str, shape: tuple) -> torch.Tensor:
    if name == "head.weight":  # a zero head would pass no gradient on, and Adam would take noise for one
        return torch.linspace(-1, 1, 5 * 24).sin().reshape(shape)
    return initial_value(template, name, shape, seed=0)


def reference(template) -> list[float]:
    """Plain torch: AdamW of one tensor each, with rates and decays written by hand; returns the loss of each step."""
    model = create_model(**MODEL, seed=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(value_of(template, name, parameter.shape))
    optimizers = {name: torch.optim.AdamW([parameter], lr=RATE) for name, parameter in model.named_parameters()}
    losses = []
    for step in range(4):
        for name, optimizer in optimizers.items():
            many = step >= 2
            optimizer.param_groups[0]["lr"] = RATE * (LAYER_DECAY ** depth_of(name) if many else 1)
            optimizer.param_groups[0]["weight_decay"] = DECAY if not many or optimizer_decays(name) else 0.0
        model.zero_grad()
        loss = F.cross_entropy(model(images(step)), labels(step))
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
        losses.append(float(loss))
    return losses


def depth_of(name: str) -> int:
    """Layers between a parameter and the head."""
    if name.startswith("blocks."):
        return 3 - int(name.split(".")[1])
    return 0 if name.startswith(("norm.", "head.")) else 4


def optimizer_decays(name: str) -> bool:
    return name.endswith("weight") and "norm" not in name


def run(template, engine: tuple[str, int], out: Path, source: Path | None, steps: int, many: bool) -> list[float]:
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": GLOBAL_BATCH, "micro_batch": 2, "data": {"train": "-"},
        "model": {"name": "vit_ti16"}, "engine": {"kind": engine[0], "zero_stage": engine[1]},
        "optim": {"weight_decay": DECAY, **({"layer_decay": LAYER_DECAY, "decay": "kernels"} if many else {})},
    }, "test")  # fmt: skip
    rank, world_size = distributed.rank(), distributed.world_size()
    built = create_engine(
        lambda: create_model(**MODEL, seed=None), lambda name, shape: value_of(template, name, shape), settings
    )
    start = 0
    if source:
        loaded = checkpoint.newest(source)
        built.load(loaded.read)
        start = loaded.samples // GLOBAL_BATCH
    objective, losses = Supervised(settings, None, 5), []
    for step in range(start, start + steps):
        mine = images(step)[rank::world_size], labels(step)[rank::world_size]
        batches = list(zip(*(each.split(2) for each in mine), strict=True))
        done = built.step(batches, lambda model, batch: objective.loss(model, *batch), lr=RATE)
        losses.append(float(done.loss))
    shapes = {name: tuple(p.shape) for name, p in template.named_parameters()}
    checkpoint.save(out, (start + steps) * GLOBAL_BATCH, built.pieces(), shapes, {})
    return losses


def images(step: int) -> torch.Tensor:
    return torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(step))


def labels(step: int) -> torch.Tensor:
    return torch.randint(0, 5, (GLOBAL_BATCH,), generator=torch.Generator().manual_seed(100 + step))


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
