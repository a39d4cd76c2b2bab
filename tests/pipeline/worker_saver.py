"""A rank that saves beside a loop of steps; files of rank 1 may not be larger than a kilobyte, at first.

worker_saver.py FOLDER   tells at which step what was raised, and the samples of the newest checkpoint in the end
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.lookout import Lookout
from pipeline.saver import Saver
from pipeline.settings import check
from shards.errors import PatchmillError

COUNT = 1000
SETTINGS = {"duration": "9 steps", "global_batch": 8, "data": {"train": "-"}, "model": {"name": "vit_b16"}}


def main(folder: Path) -> None:
    """Save twice: in vain, and well."""
    distributed.start()
    rank = distributed.rank()
    mine = [("weight", "a", rank * COUNT, torch.full((COUNT,), float(rank)))]
    found = {}
    with Saver(folder, {"a": (2, COUNT)}, check(TrainSettings, SETTINGS, "test")) as saver:
        lookout = Lookout(None, saver=saver)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        saver.save(8, mine, {})
        try:
            for step in range(1, 2000):
                dist.all_reduce(torch.ones(1))  # the step
                time.sleep(0.002)
                lookout.look(now=step % 10 == 0)
        except PatchmillError as error:
            found |= {"step": step, "error": str(error)}
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        saver.save(16, mine, {})
    found["then"] = checkpoint.newest(folder).samples
    distributed.finish()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
