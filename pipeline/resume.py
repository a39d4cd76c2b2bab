"""Where a run goes on, and which settings may change then: free, allowed (and told), or refused, as a table says."""

import sys
from pathlib import Path

from pipeline import distributed
from pipeline.checkpoint import Checkpoint, first_whole, newest
from pipeline.config import TrainSettings
from pipeline.mirror import fetch_newer
from pipeline.settings import check, flat
from pipeline.troubles import forget
from shards.atomic import put_back
from shards.errors import UserError
from shards.ledger import keep_number

RULES = {
    "kind": "refused", "seed": "refused", "loss": "refused", "label_smoothing": "refused", "masked_patch": "refused",
    "mae": "refused",
    "model": "refused", "optim.name": "refused", "data.resolution": "refused", "data.augment": "refused",
    "data.crop_area": "refused", "data.scaled_decoding": "refused", "data.resize": "refused", "data.mixup": "refused",
    "data.exclude": "refused", "data.window_bytes": "refused",
    "data": "free",  # data sets may move: the loader checks their digests, drop lists and weights
    "init": "free", "resume": "free", "log_every": "free", "checkpoint": "free", "evaluate": "free", "probe": "free",
    "watchdog": "free", "track": "free", "profile": "free", "guard": "allowed",
    "duration": "allowed", "global_batch": "allowed", "micro_batch": "allowed", "optim": "allowed",
    "schedule": "allowed", "engine": "allowed",
}  # fmt: skip
"""The longest key that fits a setting decides."""


def last_checkpoint(settings: TrainSettings, out: Path) -> Checkpoint | None:
    """Return where a run goes on; collective over all ranks.

    Returns:
        The newest whole checkpoint of the run itself, on disk or in its mirror; or else that of the other run which
        ``resume`` names; or else None.

    Raises:
        UserError: It was written with settings that may not change; there is none where ``resume`` says.
    """
    folder = out / "checkpoints"
    if distributed.rank() == 0:
        put_back(folder)
    found, mirror = newest(folder), settings.checkpoint.mirror
    if mirror and fetch_newer(mirror, folder, found.samples if found else -1):
        found = newest(folder)
    if found is not None:
        check_resume(settings, found)
        return found
    if distributed.rank() == 0:
        forget(out)
    return _of_another_run(settings, out) if settings.resume else None


def _of_another_run(settings: TrainSettings, out: Path) -> Checkpoint:
    """Return the checkpoint that ``resume`` names."""
    path = Path(settings.resume)
    found = first_whole([path]) if (path / "checkpoint.json").is_file() else newest(path / "checkpoints")
    if found is None:
        raise UserError(f"resume = {settings.resume!r} has no whole checkpoint; give one, or a training stage's folder")
    check_resume(settings, found)
    if distributed.rank() == 0:
        keep_number(out / "ledger", found.state["loader"].get("ledger"))
        print(f"going on from {found.path}, of another run", file=sys.stderr, flush=True)
    return found


def check_resume(settings: TrainSettings, loaded: Checkpoint) -> None:
    """Compare a run's settings with those of its checkpoint.

    Raises:
        UserError: A refused setting changed: with it, the run would silently be another one.
    """
    # Settings that a checkpoint is older than have their defaults.
    before = flat(check(TrainSettings, loaded.state["settings"], str(loaded.path)).model_dump(mode="json"))
    now = flat(settings.model_dump(mode="json"))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        change = f"{key} changed from {before.get(key)!r} to {now.get(key)!r}"
        rule = RULES[max((r for r in RULES if key == r or key.startswith(f"{r}.")), key=len)]
        if rule == "refused":
            raise UserError(
                f"cannot go on from {loaded.path}: {change}; set it back, or start another run in another folder"
            )
        if key == "global_batch":
            first = loaded.state.get("first_batch", before[key])
            change += f"; in duration, warmup and milestones a step stays {first} samples"
        if key == "optim.ema" and before.get(key) is None:
            change += "; the average begins as the weights"
        if rule == "allowed" and distributed.rank() == 0:
            print(f"going on from {loaded.path.name} with {change}", file=sys.stderr)
