"""A rank that trains several short stages one after another, each from the start or from where another one ended.

worker_resume.py DATA JOBS   JOBS: JSON list of {"out", "source" (null: from the start), "setup", "steps"}

What an engine holds once it has loaded a checkpoint is saved as one in OUT/loaded, before any step.
"""

import json
import shutil
import sys
from pathlib import Path

import torch.distributed as dist

import pipeline.train as training
from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines import create_engine
from pipeline.settings import check
from shards.ending import end_process

GLOBAL_BATCH, RATE = 24, 1e-3
# Without this, all parameters of so small a model stay gathered.
PARTITIONED = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
SETUPS = {
    "Accelerate": {"kind": "accelerate"},
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3, **PARTITIONED},
    "ZeRO 1, offloaded": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "ZeRO 2, offloaded": {"zero_stage": 2, "offload_optimizer": "cpu"},
    "ZeRO 3, offloaded": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu", **PARTITIONED},
}


def main(data: str, jobs: str) -> None:
    """Do one job after another."""
    distributed.start()
    for job in json.loads(jobs):
        out = Path(job["out"])
        if distributed.rank() == 0 and job["source"]:
            shutil.copytree(job["source"], out)
        dist.barrier()
        settings = {
            "duration": f"{job['steps']} steps", "global_batch": GLOBAL_BATCH, "log_every": "1 step",
            "data": {"train": data, "resolution": 16},
            "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 2},
            "optim": {"lr": RATE, "weight_decay": 0.1, "clip": 1.0, "ema": 0.9},
            "schedule": {"shape": "linear", "warmup": "2 steps", "end_lr": RATE},  # whatever the duration
            "engine": SETUPS[job["setup"]], "track": {"tensorboard": False}, "checkpoint": {"every": "1000 steps"},
        }  # fmt: skip
        training.create_engine = engine_that_tells_what_it_loaded(out / "loaded")
        out.mkdir(parents=True, exist_ok=True)
        training.train(check(TrainSettings, settings, job["out"]), out)
    distributed.finish()
    print(json.dumps(len(jobs)))


def engine_that_tells_what_it_loaded(folder: Path):
    def create(*arguments):
        engine = create_engine(*arguments)
        load = engine.load

        def load_and_tell(read) -> None:
            load(read)
            shapes = {name: tuple(tensor.shape) for name, tensor in engine.weights()}
            checkpoint.save(folder, 0, engine.pieces(), shapes, {})

        engine.load = load_and_tell
        return engine

    return create


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_process(0)
