"""One rank: what an engine really holds, saves and takes of memory.

worker_memory.py CASES   a JSON list of {"settings": ..., "model": ..., "steps": ...}; tells a list of what was found
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from pipeline import distributed
from pipeline.activations import Storages
from pipeline.config import TrainSettings
from pipeline.droppath import drop_path_draws
from pipeline.engines import accelerate, create_engine, deepspeed  # noqa: F401 (what imports take is there before)
from pipeline.microbatch import micro_batches
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives import create_objective
from pipeline.settings import check
from shards.batch import Batch
from shards.ending import end_process


def main(cases: str) -> None:
    print(json.dumps([measure(**case) for case in json.loads(cases)]))


def measure(settings: dict, model: dict, steps: int = 4) -> dict:
    AcceleratorState._reset_state()  # there is one a process, of one precision
    with Storages([]) as counted:
        return run(check(TrainSettings, settings, "test"), model, steps, counted)


def run(settings: TrainSettings, model: dict, steps: int, counted: Storages) -> dict:
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    with torch.device("meta"):
        template = create_model(**model, seed=None)
    build = partial(create_model, **model, seed=None)
    engine = create_engine(build, lambda name, shape: value_of(template, name, shape), settings)
    objective = create_objective(settings, template, None, model["num_classes"])
    saved, own = {}, set()

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def loss_fn(model, batch):
        saved.clear()
        own.clear()
        own.update(p.untyped_storage().data_ptr() for p in engine.model.parameters() if p.numel())
        own.update(t.untyped_storage().data_ptr() for t in [*engine.model.buffers(), *batch.inputs, batch.draws])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            return objective.loss(partial(model, draws=batch.draws), *batch.inputs)

    local = settings.global_batch // distributed.world_size()
    peaks = [counted.peak]
    for step in range(steps):
        counted.peak = 0  # of this step
        batch = inputs(template, objective, model["num_classes"], local, step)
        engine.step(list(micro_batches(batch, settings.micro_batch or local, 0, 0, 0)), loss_fn, 1e-3)
        peaks.append(counted.peak)
    states = states_of(engine)
    found = {"saved": sum(saved.values()), "states": states, "before": before, "most": status("VmHWM")}
    # The first step makes what is kept from then on. gloo's threads now and then still hold a tensor of a collective
    # that has ended: that only ever adds, so the least of the steps is what a step takes.
    return found | {"tensors": max(peaks[0], min(peaks[2:]))}


def states_of(engine) -> dict[str, int]:
    """Return the bytes of what an engine keeps from step to step, by what it is for."""
    parameters = list(engine.model.parameters())
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    masters = list(engine._masters()) if hasattr(engine, "_masters") else parameters
    optimizer = [t for master in masters for t in engine.optimizer.state[master].values() if isinstance(t, Tensor)]
    kinds = {"weights": weights, "masters": masters, "optimizer": optimizer, "ema": list(engine.ema.averages.values())}
    found, seen = {}, set()
    for kind, tensors in kinds.items():
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        found[kind] = sum(size for key, size in storages.items() if key not in seen)
        seen |= storages.keys()
    return {kind: size for kind, size in found.items() if size}


def value_of(template, name: str, shape: tuple) -> Tensor:
    return initial_value(template, name, shape, seed=0)


def inputs(template, objective, classes: int, n: int, step: int) -> tuple[Tensor, ...]:
    """Return a batch of noise as a stage prepares it, with the draws of stochastic depth."""
    generator = np.random.default_rng(step)
    images = generator.integers(0, 256, (n, template.image_size, template.image_size, 3), dtype=np.uint8)
    batch = Batch(images, generator.integers(0, classes, n), np.arange(n))
    draws = drop_path_draws(batch.positions, None, 0, len(template.blocks) if template.drop_path else 0)
    return *objective.prepare(batch), torch.from_numpy(draws).to(distributed.device())


def status(field: str) -> int:
    """Return a line of this process's memory in bytes."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
