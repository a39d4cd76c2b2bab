"""Where a run goes on, and which settings may change then: free, allowed (and told), or refused, as a table says."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import distributed, watchdog
from pipeline.checkpoint import NAMES, Checkpoint, first_whole, newest, pointer
from pipeline.checkpointindex import BrokenCheckpointError
from pipeline.config import TrainSettings
from pipeline.mirror import fetch_newer
from pipeline.settings import check, flat
from pipeline.troubles import forget
from pipeline.watchdog import Watchdog
from shards.atomic import put_back, write_text
from shards.errors import UserError
from shards.ledger import keep_number

RULES = {
    "kind": "refused", "seed": "refused", "loss": "refused", "label_smoothing": "refused", "masked_patch": "refused",
    "mae": "refused",
    "model": "refused", "optim.name": "refused", "data.resolution": "refused", "data.augment": "refused",
    "data.crop_area": "refused", "data.scaled_decoding": "refused", "data.resize": "refused", "data.mixup": "refused",
    "data.mirror": "refused", "data.exclude": "refused", "data.subset": "refused", "data.window_bytes": "refused",
    "data": "free",  # data sets may move: the loader checks their digests, drop lists and weights
    "init": "free", "resume": "free", "log_every": "free", "checkpoint": "free", "evaluate": "free", "probe": "free",
    "watchdog": "free", "track": "free", "profile": "free", "guard": "allowed",
    "duration": "allowed", "global_batch": "allowed", "micro_batch": "allowed", "optim": "allowed",
    "schedule": "allowed", "engine": "allowed",
}  # fmt: skip
"""The longest key that fits a setting decides."""


def rule_of(key: str) -> str:
    """Return whether a setting, by its dotted key, may change when a run goes on: free, allowed, or refused."""
    return RULES[max((rule for rule in RULES if key == rule or key.startswith(f"{rule}.")), key=len)]


def last_checkpoint(settings: TrainSettings, out: Path, watch: Watchdog) -> Checkpoint | None:
    """Return where a run goes on; collective over all ranks.

    Args:
        settings: Of the stage.
        out: Its folder.
        watch: Of this rank; a mirror may take as long as it takes.

    Returns:
        The newest whole checkpoint of the run itself, on disk or in its mirror; or else that of the other run which
        ``resume`` names; or else None.

    Raises:
        UserError: It was written with settings that may not change; there is none where ``resume`` says; or there are
            some of the run itself, and none is whole.
    """
    folder, mirror = out / "checkpoints", settings.checkpoint.mirror
    if distributed.rank() == 0:
        put_back(folder)
    found, fetched = newest(folder), None
    broken: list[str] = []
    if mirror:
        watch.at(watchdog.MIRRORING, 0)
        fetched, broken = fetch_newer(mirror, folder, found.samples if found else -1, partial(changes, settings))
        watch.at(watchdog.STARTING, 0)
    if fetched:
        found = first_whole([folder / fetched]) or found
    if found is not None:
        check_resume(settings, found)
        if distributed.rank() == 0 and pointer(folder, "latest") != found.path:
            write_text(folder / "latest", found.path.name + "\n")  # what is newer is broken
        return found
    broken = distributed.everyone([*map(str, sorted(folder.glob(NAMES))), *broken])[0]
    if broken:
        raise UserError(
            f"none of the checkpoints of this run is whole: {', '.join(broken)}; put their files back, give another "
            "--out, or delete them to start from scratch"
        )
    if distributed.rank() == 0:
        forget(out)
    return _of_another_run(settings, settings.resume, out) if settings.resume else None


def _of_another_run(settings: TrainSettings, resume: str, out: Path) -> Checkpoint:
    """Return the checkpoint that ``resume`` names."""
    path = Path(resume)
    found = first_whole([path]) if (path / "checkpoint.json").is_file() else newest(path / "checkpoints")
    if found is None:
        raise UserError(f"resume = {resume!r} has no whole checkpoint; give one, or a training stage's folder")
    check_resume(settings, found)
    if distributed.rank() == 0:
        keep_number(out / "ledger", found.state["loader"].get("ledger"))
        print(f"going on from {found.path}, of another run", file=sys.stderr, flush=True)
    return found


def check_resume(settings: TrainSettings, loaded: Checkpoint) -> None:
    """Compare a run's settings with those of its checkpoint, and tell what changed.

    Raises:
        UserError: As of ``changes``.
    """
    for change in changes(settings, loaded.state, loaded.path):
        if distributed.rank() == 0:
            print(f"going on from {loaded.path.name} with {change}", file=sys.stderr)


def changes(settings: TrainSettings, state: dict[str, Any], where: object) -> list[str]:
    """Return which settings changed that may, and are told, since a checkpoint was written.

    Args:
        settings: Of the run.
        state: Of the checkpoint.
        where: It is, for errors.

    Raises:
        UserError: A refused setting changed: with it, the run would silently be another one.
        BrokenCheckpointError: It does not say what it was written with.
    """
    if "settings" not in state:
        raise BrokenCheckpointError(f"{where} does not say which settings it was written with; use another checkpoint")
    # Settings that a checkpoint is older than have their defaults.
    before = flat(check(TrainSettings, state["settings"], str(where)).model_dump(mode="json"))
    now = flat(settings.model_dump(mode="json"))
    told = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
            continue
        change = f"{key} changed from {before.get(key)!r} to {now.get(key)!r}"
        rule = rule_of(key)
        if rule == "refused":
            raise UserError(
                f"cannot go on from {where}: {change}; set it back, or start another run in another folder, with "
                "another mirror if it has one"
            )
        if key == "global_batch":
            first = state.get("first_batch", before[key])
            change += f"; in duration, warmup and milestones a step stays {first} samples"
        if key == "optim.ema" and before.get(key) is None:
            change += "; the average begins as the weights"
        if rule == "allowed":
            told.append(change)
    return told
