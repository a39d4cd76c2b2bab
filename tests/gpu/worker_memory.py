"""One rank on a GPU: take steps of a model; tell the losses, what was allocated at most, and what the estimate says.

worker_memory.py CASES   a JSON list of {"settings": ..., "model": ...}; tells a list of what was found
"""

import gc
import json
import sys
from functools import partial

import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.memory import MemoryEstimate
from pipeline.microbatch import micro_batches
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from pipeline.objectives import create_objective
from pipeline.settings import check
from shards.ending import end_process
from tests.pipeline.worker_memory import inputs

STEPS = 4


def main(cases: str) -> None:
    found = [measure(check(TrainSettings, each["settings"], "test"), each["model"]) for each in json.loads(cases)]
    print(json.dumps(found))


def measure(settings: TrainSettings, model: dict) -> dict:
    """Return the ``losses`` of the steps, the ``allocated`` bytes at most, and the ``estimated`` ones."""
    AcceleratorState._reset_state()  # there is one a process, of one precision
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.device("meta"):
        template = create_model(**model, seed=None)

    def value_of(name: str, shape: tuple) -> Tensor:
        if name == "head.weight":  # zeros would pass no gradient on, and every first loss would be the same
            return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 10
        return initial_value(template, name, shape, seed=0)

    engine = create_engine(lambda: create_model(**model, seed=None), value_of, settings)
    if engine.scale:
        engine.scale.value = 256.0  # the first scale makes the first steps overflow, which float32 does not skip
    objective = create_objective(settings, template, None, model["num_classes"])
    local = settings.global_batch // distributed.world_size()
    losses = []
    for step in range(STEPS):
        seed = step * distributed.world_size() + distributed.rank()
        batch = inputs(template, objective, model["num_classes"], local, seed)
        parts = list(micro_batches(batch, settings.micro_batch or local, 0, 0, 0))
        done = engine.step(parts, partial(_loss, objective), 1e-3)
        losses.append(float(done.loss))
    memory = MemoryEstimate(settings, model, distributed.world_size(), cuda=True)
    estimated = memory.at(settings.micro_batch or memory.local).device_peak
    allocated = torch.cuda.max_memory_allocated() - before
    engine.close()
    return {"losses": losses, "allocated": allocated, "estimated": estimated}


def _loss(objective, model, batch) -> Tensor:
    return objective.loss(model, *batch.inputs)


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
