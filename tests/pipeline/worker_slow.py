"""One rank of a stage under ZeRO 3 and one under ZeRO 1; rank 1 gets each batch late: worker_slow.py FOLDER."""

import sys
import time
from pathlib import Path

import pipeline.train
from pipeline import distributed, liveness
from pipeline.config import TrainSettings
from pipeline.settings import check
from shards.ending import end_process
from shards.errors import PatchmillError

liveness.BEAT, liveness.GRACE = 0.2, 1.0
TABLE = {
    "duration": "9 steps", "global_batch": 12, "log_every": "3 steps", "checkpoint": {"every": "9 steps"},
    "optim": {"ema": 0.9},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1},
}  # fmt: skip
GATHERED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # for each pass, small as they are


def late(batches):
    for batch in batches:
        time.sleep(0.2)
        yield batch


def main(folder: Path) -> None:
    prefetched = pipeline.train.prefetched
    if distributed.rank() == 1:
        pipeline.train.prefetched = lambda *of: late(prefetched(*of))
    with distributed.together():
        for stage, val in ((3, None), (1, "val")):
            data = {"train": str(folder / "set/train"), "val": val and str(folder / "set/val"), "resolution": 16}
            engine = {"zero_stage": stage, "deepspeed": GATHERED if stage == 3 else {}}
            evaluate = {"every": "9 steps", "ema": val is not None, "batch": 4}
            settings = check(TrainSettings, {**TABLE, "data": data, "engine": engine, "evaluate": evaluate}, "test")
            pipeline.train.train(settings, folder / f"run-{stage}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except PatchmillError as error:
        print(f"error: {error}", file=sys.stderr)
        end_process(error.exit_code)
