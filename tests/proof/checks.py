"""What must hold of a disturbed run, beside one that nobody disturbed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file

from launch.submission import Record
from shards.audit import audit
from tests.command import losses
from tests.proof.faults import CHANGING, STAGES
from tests.slurm.runs import Submitted, same, weights_of

TOLERANCE = 1e-4  # of losses, on other numbers of ranks


@dataclass(frozen=True)
class Claim:
    """One thing that must hold, whether it does, and what was found."""

    what: str
    holds: bool
    found: str


def check_all(run: Submitted, undisturbed: Path, broken: set[str], positions: int) -> list[Claim]:
    """Check everything.

    Args:
        run: On the cluster, with nothing of it in the queue any more.
        undisturbed: Folder of the other run.
        broken: Keys of the images that were planted.
        positions: That each training stage has.
    """
    found = [_checked("every stage is done", _done, run)]
    if not found[0].holds:
        return found
    for stage in STAGES:
        here, there = run.stage(stage), undisturbed / "stages" / stage
        once = f"{stage}: each position once, each sample once an epoch, but for the quarantine list"
        found.append(_checked(once, _audited, here, positions))
        found.append(_checked(f"{stage}: the quarantine list is what was planted", _quarantined, here, broken))
        found.append(_checked(f"{stage}: each line of the log is there once", _one_history, here, there))
        if stage == CHANGING:
            found.append(_checked(f"{stage}: losses within {TOLERANCE}", _losses, here, there))
        else:
            found.append(_checked(f"{stage}: weights and optimizer equal to the bit", _equal, here, there))
    here, there = run.stage("convert"), undisturbed / "stages" / "convert"
    return [*found, _checked("convert: weights equal to the bit", _converted, here, there)]


def _checked(what: str, check: Callable[..., tuple[bool, str]], *arguments: object) -> Claim:
    try:
        return Claim(what, *check(*arguments))
    except Exception as error:  # noqa: BLE001 (what cannot be read does not hold)
        return Claim(what, False, f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}")


def _done(run: Submitted) -> tuple[bool, str]:
    states = {name: Record(run.run, name).table.get("state", "not begun") for name in run.jobs}
    if set(states.values()) != {"done"}:
        return False, _listed(states)
    tries = {name: run.record(name)["tries"] for name in STAGES}
    return True, f"tries since they were submitted last: {_listed(tries)}"


def _audited(folder: Path, positions: int) -> tuple[bool, str]:
    told = audit(folder)
    ranks = f"{', '.join(map(str, sorted(set(told.ranks))))} ranks"
    starts = f"{len(told.ranks)} starts in the lineage, on {ranks}"
    found = f"{told.positions} positions, {told.sources[0].epochs} whole epochs, {starts}"
    if told.counts:
        found += f"; {told.counts}: {'; '.join(misfit.reason for misfit in told.misfits[:3])}"
    return told.positions == positions and not told.counts, found


def _quarantined(folder: Path, broken: set[str]) -> tuple[bool, str]:
    keys = [json.loads(line)["key"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    odd = sorted(set(keys) ^ broken)[:5]
    found = f"{len(keys)} listed, {len(broken)} planted" + (f"; differ in {', '.join(odd)}" if odd else "")
    return set(keys) == broken and len(keys) == len(broken), found


def _one_history(here: Path, there: Path) -> tuple[bool, str]:
    one, other = ([at for at, _ in losses(folder)] for folder in (here, there))
    return bool(one) and one == other == sorted(set(one)), f"{len(one)} lines, {len(other)} of the undisturbed run"


def _losses(here: Path, there: Path) -> tuple[bool, str]:
    one, other = dict(losses(here)), dict(losses(there))
    if not one or one.keys() != other.keys():
        return False, "logged at other samples"
    apart = [abs(one[at] - other[at]) for at in one]
    holds = all(each <= TOLERANCE for each in apart)  # which a NaN is not
    return holds, f"{max(apart):.1e} at most, of {one[max(one)]:.3f}"


def _equal(here: Path, there: Path) -> tuple[bool, str]:
    one, other = (weights_of(max((folder / "checkpoints").glob("samples-*"))) for folder in (here, there))
    return same(one, other), f"{len(one)} pieces"


def _converted(here: Path, there: Path) -> tuple[bool, str]:
    one, other = (load_file(folder / "model.safetensors") for folder in (here, there))
    return same(one, other), f"{len(one)} tensors"


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
