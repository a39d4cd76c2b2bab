"""One rank: the same few steps under many settings of the engine, one after another.

worker_settings.py FOLDER CASE...   tells for each case losses, norms, digests and what became of the moving average

Each case takes three steps and is saved; then one more under the next case (the last goes on in the first).
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.engines.configuration import deepspeed_config
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check
from shards.ending import end_process

# Processors that multiply in float16 itself (AVX512_FP16, AMX) round so coarsely that the last bit of a float32 weight
# becomes up to 1e-4 of a loss in two steps of Adam: more than the settings may differ by. Without these instructions
# products are summed in float32, as on other processors. oneDNN reads this at its first product.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
MODEL = {
    "name": "vit_ti16", "image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3,
    "num_classes": 5, "drop_path": 0.1,
}  # fmt: skip
# Of what a rank has of a parameter, less than a megabyte is never on NVMe.
WIDE = MODEL | {"embed_dim": 192, "depth": 3, "mlp_dim": 3072}
GLOBAL_BATCH, RATE, DECAY = 12, 0.01, 0.8
# Without this, all parameters of so small a model stay gathered.
PARTITIONED = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
CASES = {
    "accelerate": {"kind": "accelerate"},
    **{f"zero{stage}": {"zero_stage": stage} for stage in range(4)},
    "zero3-partitioned": {"zero_stage": 3, **PARTITIONED},
    **{f"zero{stage}-optimizer": {"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2, 3)},
    "zero3-parameters": {"zero_stage": 3, "offload_parameters": "cpu", **PARTITIONED},
    "zero3-both": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu", **PARTITIONED},
    "accelerate-recompute": {"kind": "accelerate", "recompute_every": 1},
    "zero2-recompute": {"zero_stage": 2, "recompute_every": 2},
    "zero3-recompute": {"zero_stage": 3, "recompute_every": 1, **PARTITIONED},
    "zero3-recompute2": {"zero_stage": 3, "recompute_every": 2, **PARTITIONED},
    "accelerate-compile": {"kind": "accelerate", "compile": True},
    **{f"zero{stage}-compile": {"zero_stage": stage, "compile": True} for stage in range(3)},
    "zero3-compile": {"zero_stage": 3, "compile": True, **PARTITIONED},
    "zero3-compile-recompute": {"zero_stage": 3, "compile": True, "recompute_every": 1, **PARTITIONED},
}
NVME = os.environ.get("NVME", "")
CASES |= {
    "accelerate-wide": {"kind": "accelerate"},
    "optimizer-nvme-wide": {"zero_stage": 3, "offload_optimizer": NVME, **PARTITIONED},
    "parameters-nvme-wide": {"zero_stage": 3, "offload_parameters": NVME, **PARTITIONED},
    "both-nvme-wide": {"zero_stage": 3, "offload_optimizer": NVME, "offload_parameters": NVME, **PARTITIONED},
}
LOW = ("accelerate", "zero0", "zero1", "zero2", "zero3", "zero3-partitioned", "zero2-optimizer", "zero3-both",
       "zero3-recompute")  # fmt: skip
CASES |= {f"{name}-bfloat16": {**CASES[name], "precision": "bfloat16"} for name in LOW}
CASES |= {f"{name}-float16": {**CASES[name], "precision": "float16"} for name in LOW if name != "accelerate"}


def main(folder: str, *names: str) -> None:
    found = {name: train(name, Path(folder) / name, None, 3) for name in names}
    for number, name in enumerate(names):
        before = names[number - 1]
        on = train(name, Path(folder) / f"{name}-on", Path(folder) / before, 1)
        found[name] |= {"resumed": on["losses"], "scale_resumed": on["scale_first"]}
    print(json.dumps(found))


def train(name: str, out: Path, source: Path | None, steps: int) -> dict:
    micro_batch = 2 if distributed.world_size() < 4 else 3  # of four ranks each has three
    settings = check(TrainSettings, {
        "duration": "1 epoch", "global_batch": GLOBAL_BATCH, "micro_batch": micro_batch, "data": {"train": "-"},
        "model": {"name": "vit_ti16"}, "optim": {"clip": 1.0, "weight_decay": 0.1, "ema": DECAY, "decay": "kernels"},
        "engine": CASES[name],
    }, "test")  # fmt: skip
    numbers = WIDE if name.endswith("-wide") else MODEL
    with torch.device("meta"):
        template = create_model(**numbers, seed=None)
    holding = []
    engine = new_engine(settings, numbers, template, lambda loss, norm: torch.tensor(bool(holding)))
    first = digest(engine.weights())
    start = 0
    if source is not None:
        loaded = checkpoint.newest(source)
        engine.load(loaded.read)
        start = loaded.samples // GLOBAL_BATCH
    scale_first = scale(engine)
    average = {name: tensor.numpy().astype(np.float64) for name, tensor in engine.weights(ema=source is not None)}
    before = state(engine)
    holding.append(True)
    held = [bool(take(engine, settings, 0, numbers["depth"]).applied), state(engine) == before]
    holding.clear()
    overflow = overflowed(engine, settings, numbers["depth"]) if settings.engine.precision == "float16" else None
    losses, norms, applied = [], [], []
    for number in range(start, start + steps):
        done = take(engine, settings, number, numbers["depth"])
        losses.append(float(done.loss))
        norms.append(float(done.grad_norm))
        applied.append(bool(done.applied))
        for parameter, tensor in engine.weights():
            if applied[-1]:
                average[parameter] += (1 - DECAY) * (tensor.numpy() - average[parameter])
    weights = digest(engine.weights())
    far = max(float(np.abs(tensor.numpy() - average[name]).max()) for name, tensor in engine.weights(ema=True))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(99))
    engine.model.eval()
    with torch.no_grad():
        plain = engine.model(images).float()
        with engine.averaged():
            averaged = engine.model(images).float()
        again = engine.model(images).float()
    model = create_model(**numbers, seed=None)
    model.load_state_dict({name: torch.from_numpy(value).float() for name, value in average.items()})
    with torch.no_grad():
        expected = model.eval()(images)
    shapes = {name: tuple(p.shape) for name, p in template.named_parameters()}
    checkpoint.save(out, (start + steps) * GLOBAL_BATCH, engine.pieces(), shapes, {})
    return {
        "first": first, "losses": losses, "norms": norms, "applied": applied, "weights": weights,
        "weights_after": digest(engine.weights()), "average_far": far,
        "plain_again": bool(torch.equal(plain, again)), "averaged_far": float((averaged - expected).abs().max()),
        "averaged_differs": float((averaged - plain).abs().max()), "overflow": overflow, "held": held,
        "scale_first": scale_first, "scale_last": scale(engine),
    }  # fmt: skip


def new_engine(settings: TrainSettings, numbers: dict, template, guard):
    def value_of(name: str, shape: tuple) -> torch.Tensor:
        if name == "head.weight":  # a zero head would pass no gradient on, and Adam would take noise for one
            return torch.linspace(-1, 1, shape[0] * shape[1]).sin().reshape(shape)
        return initial_value(template, name, shape, seed=0)

    def build():
        return create_model(**numbers, seed=None)

    if settings.engine.precision == "float16":  # refused on a CPU, but it runs
        from pipeline.engines.deepspeed import DeepSpeedEngine

        config = deepspeed_config(settings, distributed.world_size(), [10**6], False)
        return DeepSpeedEngine(build, value_of, settings, config, guard)
    return create_engine(build, value_of, settings, guard)


def take(engine, settings: TrainSettings, number: int, depth: int):
    rank, world_size = distributed.rank(), distributed.world_size()
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=generator)[rank::world_size]
    labels = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)[rank::world_size]
    draws = torch.rand(GLOBAL_BATCH, depth, 2, generator=generator)[rank::world_size]
    objective = Supervised(settings, None, 5)
    batches = list(zip(*(each.split(settings.micro_batch) for each in (images, labels, draws)), strict=True))

    def loss_fn(model, batch):
        images, labels, draws = batch
        return objective.loss(lambda images: model(images, draws=draws), images, labels)

    return engine.step(batches, loss_fn, lr=RATE if depth == MODEL["depth"] else RATE / 20)


def scale(engine) -> list | None:
    """Return the factor of the loss, and the good steps since it changed."""
    return engine.scale and [engine.scale.value, engine.scale._good]


def overflowed(engine, settings: TrainSettings, depth: int) -> list:
    """Take a step whose scaled gradients are not finite; tell what it changed. The factor is a quarter then."""
    before, factor = digest(engine.weights()), engine.scale.value
    engine.scale.value = 2.0**100
    done = take(engine, settings, 0, depth)
    halved, engine.scale.value = engine.scale.value, factor / 4
    return [bool(done.applied), float(done.loss), halved / 2.0**100, digest(engine.weights()) == before]


def state(engine) -> str:
    """Return a digest of all that a step may change, and a held one not."""
    kept = [piece for piece in engine.pieces() if piece[0] != "loss_scale"]
    return digest([*((f"{kind} {name}", tensor) for kind, name, _, tensor in kept), *engine.weights()])


def digest(weights) -> str:
    found = hashlib.sha256()
    for name, tensor in weights:
        found.update(name.encode() + tensor.detach().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
