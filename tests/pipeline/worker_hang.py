"""One rank of a training stage, of which rank 1 never gets its Nth batch: worker_hang.py FOLDER N."""

import sys
import time
from pathlib import Path

import pipeline.train
from pipeline import distributed, liveness, watchdog
from pipeline.config import TrainSettings
from pipeline.settings import check

liveness.BEAT, watchdog.GRACE = 0.2, 1.0
TABLE = {
    "duration": "9 steps", "global_batch": 12, "watchdog": 3, "engine": {"kind": "accelerate"},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1},
}  # fmt: skip


def never(batches, number):
    for index, batch in enumerate(batches, 1):
        if index == number:
            time.sleep(1000)
        yield batch


if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    settings = check(TrainSettings, {**TABLE, "data": {"train": str(folder / "set"), "resolution": 16}}, "test")
    prefetched = pipeline.train.prefetched
    if distributed.rank() == 1:
        pipeline.train.prefetched = lambda *of: never(prefetched(*of), number)
    with distributed.together():
        pipeline.train.train(settings, folder / "run")
