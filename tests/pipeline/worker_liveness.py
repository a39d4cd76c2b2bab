"""One rank, whose signs of life come fast: worker_liveness.py HOW RANK, where HOW is what that rank does."""

import datetime
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline import distributed, liveness
from pipeline.watchdog import Watchdog
from shards.ending import end_process
from shards.errors import PatchmillError, StoppedOnRequestError, UserError

liveness.BEAT, liveness.GONE, liveness.GRACE = 0.1, 1.5, 1.0


def late(rank: int) -> None:
    """Come to a collective later than the timeout that its group was made with."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=1.5))
    with Watchdog(Path(), 600, distributed.rank(), list):
        if distributed.rank() == rank:
            time.sleep(4)
        dist.all_reduce(torch.ones(1), group=group)


def main(how: str, rank: int) -> None:
    with distributed.together():
        dist.all_reduce(torch.ones(1))
        if how == "late":
            late(rank)
            return
        if distributed.rank() == rank:
            if how in ("killed", "alone"):
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if how == "error":
                raise UserError("the data is gone; bring it back")
            if how == "bug":
                raise KeyError("x")
        if how == "request":
            raise StoppedOnRequestError("saved")
        if how == "early" and distributed.rank() != rank:
            return
        if how == "early":
            time.sleep(3)  # the others have left long ago, and are not dead
            return
        if how == "alone":
            time.sleep(100)  # not in a collective: no library will say anything
        dist.all_reduce(torch.ones(1))
        time.sleep(30)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except PatchmillError as error:
        print(f"error: {error}", file=sys.stderr)
        end_process(error.exit_code)
    end_process(0)
