"""Smoke runs: a training stage shrunk to seconds, in this process, in a folder that goes away afterwards."""

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline import distributed
from pipeline.config import TrainSettings, check
from pipeline.recipe import About
from pipeline.smoke import fill_in, shrink
from pipeline.train import train
from pipeline.weights import Weights
from shards.errors import UserError


def smoke_run(table: dict[str, Any], about: About | None, where: str, out: Path | None = None) -> dict[str, Any]:
    """Run the smoke form of a training stage; collective over all ranks.

    Args:
        table: Settings of the stage; data and weights that it does not name are made on the spot.
        about: Of its recipe, if it has one.
        where: The settings stand, for errors.
        out: Folder to keep what it makes.

    Returns:
        What ``train`` returns, and ``seconds`` that it took.
    """
    began = time.monotonic()
    distributed.start()
    rank, ranks = distributed.rank(), distributed.world_size()
    try:
        with ExitStack() as stack:
            if out is None:
                mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="patchmill-smoke-")) if rank == 0 else ""
                out = Path(distributed.everyone(mine)[0])
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(distributed.alone_in(out))
            problem = None
            try:
                table, weights = fill_in(table, about, out, make=rank == 0)
            except UserError as error:
                problem = error
            distributed.raise_together(problem)  # and rank 0 has made everything when the others go on
            settings = check(TrainSettings, table, where)
            if weights is None and settings.init is not None:
                weights = Weights(settings.init).model
            result = train(shrink(settings, ranks, weights), out)
    finally:
        distributed.finish()
    return {**result, "seconds": round(time.monotonic() - began, 1)}
