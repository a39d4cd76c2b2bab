"""Checkpoints of ours, whatever engine, ZeRO stage and number of ranks wrote them."""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from pipeline import checkpoint
from pipeline.checkpointindex import BrokenCheckpointError
from pipeline.convert.source import ODD, Source
from shards.errors import UserError


def is_ours(path: Path) -> bool:
    """Tell whether a folder is a checkpoint, or a training stage's folder with some."""
    return (path / "checkpoint.json").is_file() or (path / "checkpoints").is_dir()


def find_checkpoint(source: str | Path, which: str = "latest") -> checkpoint.Checkpoint:
    """Return the verified checkpoint at ``source``: a checkpoint folder, or a training stage's folder.

    Args:
        source: The folder.
        which: For a stage's folder, the pointer to follow: ``"latest"`` or ``"best"``.

    Raises:
        UserError: There is none.
        BrokenCheckpointError: It was named, and does not pass verification.
    """
    source = Path(source)
    if (source / "checkpoint.json").is_file():
        found = checkpoint.Checkpoint(source)
        found.verify()
        return found
    folder = source / "checkpoints"
    named = None if which == "latest" else checkpoint.pointer(folder, which)
    candidates = checkpoint.whole_checkpoints(folder) if which == "latest" else [named] if named else []
    for path in candidates:
        try:
            found = checkpoint.Checkpoint(path)
            found.verify()
        except BrokenCheckpointError as error:
            print(checkpoint.passed_over(error, path != candidates[-1]), file=sys.stderr)
            continue
        return found
    raise UserError(
        f"there is no whole {which} checkpoint in {source}; give a checkpoint folder, or the folder of a training "
        "stage that saved one"
    )


def source(found: checkpoint.Checkpoint, ema: bool) -> Source:
    """Return the model of a checkpoint, or of the moving average of its weights."""
    try:
        return _source(found, ema)
    except ODD as error:
        raise BrokenCheckpointError(
            f"{found.path} tells of its model otherwise than Patchmill does ({error!r}); use another checkpoint"
        ) from error


def _source(found: checkpoint.Checkpoint, ema: bool) -> Source:
    state = found.state
    if ema and state["settings"]["optim"].get("ema") is None:
        raise UserError(
            f"{found.path} has no moving average of the weights; train with optim.ema, or take the weights themselves"
        )

    def tensor(name: str) -> Tensor:
        shape = torch.Size(found.shapes[name])
        return found.read("ema" if ema else "weight", name, 0, shape.numel()).reshape(shape).clone()

    settings = state["settings"]
    note = {
        "samples": found.samples,
        "ema": ema,
        "val": state["val"],
        "commit": state["commit"],
        "versions": state["versions"],
        "settings": settings,
    }
    made = Source("checkpoint", state["model"], tensor, state["classes"], note)
    shapes = {name: tuple(parameter.shape) for name, parameter in made.parameters().items()}
    if wrong := next((name for name, shape in shapes.items() if found.shapes.get(name) != shape), None):
        raise ValueError(f"{wrong} is {found.shapes.get(wrong)} there, {shapes[wrong]} of its model")
    if 4 * sum(map(math.prod, shapes.values())) > sum(file["bytes"] for file in found.files):
        raise ValueError("its files are too small for it")
    return made
