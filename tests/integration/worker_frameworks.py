"""One rank: a user's own loop over a Loader under Accelerate or DeepSpeed; writes the batches that it got.

worker_frameworks.py accelerate|deepspeed DATASET OUT
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import distributed
from shards.augment import InceptionCrop
from shards.batch import Batch
from shards.dataset import Dataset
from shards.ending import end_process
from shards.loader import Loader

STEPS, BATCH = 3, 8


def main(framework: str, dataset: str, out: str) -> None:
    rank = int(os.environ["RANK"])
    loader = Loader(
        Dataset.open(dataset), global_batch=BATCH, transform=InceptionCrop(8), seed=5, stop=2 * STEPS * BATCH,
        rank=rank, world_size=int(os.environ["WORLD_SIZE"]),
    )  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 8 * 3, 3))
    seen = {"accelerate": under_accelerate, "deepspeed": under_deepspeed}[framework](loader, model, Path(out))
    Path(out, f"{rank}.json").write_text(json.dumps(seen))


def under_accelerate(loader: Loader, model: nn.Module, out: Path) -> list[list]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    given = loader
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    assert loader is given
    assert len(loader) == 2 * STEPS
    accelerator.register_for_checkpointing(loader)
    seen = []
    for step, batch in enumerate(loader, start=1):
        accelerator.backward(loss(model, batch))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(described(batch))
        if step == STEPS:
            accelerator.save_state(out / "state")
    assert len(loader) == 0
    accelerator.load_state(out / "state")
    assert loader.samples == STEPS * BATCH
    assert [described(batch) for batch in loader] == seen[STEPS:]
    accelerator.end_training()
    return seen


def under_deepspeed(loader: Loader, model: nn.Module, out: Path) -> list[list]:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes half a minute to build, and is not used here
    distributed.start()
    settings = {
        "train_batch_size": BATCH,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 0},
    }
    engine, _, none, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    assert none is None  # no training data was given, so DeepSpeed made no loader
    seen = []
    for batch in loader:
        engine.backward(loss(engine, batch))
        engine.step()
        seen.append(described(batch))
        if len(seen) == STEPS:
            engine.save_checkpoint(out / "state", client_state={"loader": loader.state_dict()})
    _, state = engine.load_checkpoint(out / "state")
    loader.load_state_dict(state["loader"])
    assert [described(batch) for batch in loader] == seen[STEPS:]
    return seen


def loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(torch.from_numpy(batch.images).float() / 255)
    return nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))


def described(batch: Batch) -> list:
    rows = zip(batch.positions.tolist(), batch.labels.tolist(), batch.images, strict=True)
    return [[position, label, hashlib.sha256(image.tobytes()).hexdigest()] for position, label, image in rows]


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
