"""One rank of a training stage whose mirror is slow: worker_mirror.py FOLDER end|stop|fetch."""

import datetime
import sys
import time
from pathlib import Path

from pipeline import distributed, watchdog
from pipeline.config import TrainSettings
from pipeline.lookout import Lookout
from pipeline.settings import check
from pipeline.train import train
from shards.ending import end_process
from shards.errors import PatchmillError
from shards.localstore import LocalStore

TABLE = {
    "duration": "4 steps", "global_batch": 12, "watchdog": 2, "engine": {"kind": "accelerate"},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1},
}  # fmt: skip


def slow(name: str, seconds: float) -> None:
    """Let a call of the store take longer, and longer than saving may."""
    real = getattr(LocalStore, name)

    def call(self, path, *arguments):
        if path.endswith("safetensors"):
            watchdog.LONGER = 1
            time.sleep(seconds)
        return real(self, path, *arguments)

    setattr(LocalStore, name, call)


def main(folder: Path, how: str) -> None:
    """Train, where the mirror takes seconds a file."""
    if how == "fetch":
        distributed.TIMEOUT = datetime.timedelta(seconds=2)
        slow("stream", 4.0)
    else:
        slow("upload", 3.5)
    if how == "stop":
        looks, real = [], Lookout.look

        def look(self, now=False):
            looks.append(1)
            return real(self, now)._replace(stop=len(looks) == 3)

        Lookout.look = look
    table = {
        **TABLE, "data": {"train": str(folder / "set"), "resolution": 16},
        "checkpoint": {"mirror": str(folder / "mirror")},
    }  # fmt: skip
    with distributed.together():
        train(check(TrainSettings, table, "test"), folder / "run")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2])
    except PatchmillError as error:
        print(f"error: {error}", file=sys.stderr)
        end_process(error.exit_code)
    end_process(0)
