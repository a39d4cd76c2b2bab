"""Which settings may change when a run goes on: free, allowed (and told), or refused. One table says which."""

import sys

from pipeline import distributed
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainSettings, check, flat
from shards.errors import UserError

RULES = {
    "kind": "refused", "seed": "refused", "loss": "refused", "label_smoothing": "refused", "masked_patch": "refused",
    "mae": "refused",
    "model": "refused", "optim.name": "refused", "data.resolution": "refused", "data.augment": "refused",
    "data.crop_area": "refused", "data.scaled_decoding": "refused", "data.resize": "refused", "data.mixup": "refused",
    "data.exclude": "refused", "data.window_bytes": "refused",
    "data": "free",  # data sets may move: the loader checks their digests, drop lists and weights
    "init": "free", "log_every": "free", "checkpoint": "free", "evaluate": "free", "probe": "free",
    "watchdog": "free", "track": "free", "profile": "free", "guard": "allowed",
    "duration": "allowed", "global_batch": "allowed", "micro_batch": "allowed", "optim": "allowed",
    "schedule": "allowed", "engine": "allowed",
}  # fmt: skip
"""The longest key that fits a setting decides."""


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
