"""One rank of two: train ViT-H/14 under ZeRO 3; tell losses and the most memory that this process ever had.

worker_vit_h.py DATASET OUT STEPS
"""

import json
import re
import sys
from pathlib import Path

from pipeline import distributed
from pipeline import train as loop
from pipeline.config import TrainSettings
from pipeline.settings import check
from shards.ending import end_process


def peak() -> int:
    """Return the most bytes that were ever resident."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def main(data: str, out: str, steps: str) -> None:
    settings = check(TrainSettings, {
        "duration": f"{steps} steps", "global_batch": 2, "micro_batch": 1, "log_every": "1 step",
        "data": {"train": data, "threads": 1, "window_bytes": 10**6}, "model": {"name": "vit_h14"},
        "optim": {"lr": 1e-3, "clip": 1.0}, "checkpoint": {"every": "2 steps", "asynchronous": False},
        "engine": {"zero_stage": 3, "precision": "bfloat16", "recompute_every": 1},
    }, "test")  # fmt: skip
    Path(out).mkdir(exist_ok=True)
    first_values, built = loop.first_values, []

    def watched(*arguments):
        value_of = first_values(*arguments)

        def value(name, shape):
            built.append(peak())  # at each parameter, and after it was made on all ranks
            return value_of(name, shape)

        return value

    loop.first_values = watched
    before = peak()
    done = loop.train(settings, Path(out))
    print(json.dumps({"samples": done["samples"], "building": built[-1] - before, "peak": peak()}))


if __name__ == "__main__":
    distributed.start()
    main(*sys.argv[1:])
    distributed.finish()
    end_process(0)
