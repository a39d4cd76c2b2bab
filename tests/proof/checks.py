"""What must hold of a disturbed run, beside one that nobody disturbed."""

import json
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


def check_all(run: Submitted, undisturbed: Path, broken: set[str]) -> list[Claim]:
    """Check everything.

    Args:
        run: On the cluster, with nothing of it in the queue any more.
        undisturbed: Folder of the other run.
        broken: Keys of the images that were planted.
    """
    states = {name: Record(run.run, name).table.get("state", "not begun") for name in run.jobs}
    found = [Claim("every stage is done", set(states.values()) == {"done"}, _listed(states))]
    if not found[0].holds:
        return found
    tries = {name: run.record(name)["tries"] for name in STAGES}
    found[0] = Claim(found[0].what, True, f"tries since they were submitted last: {_listed(tries)}")
    for stage in STAGES:
        here, there = run.stage(stage), undisturbed / "stages" / stage
        found += [_audited(stage, here), _quarantined(stage, here, broken), _one_history(stage, here)]
        if stage == CHANGING:
            found.append(_losses(stage, here, there))
        else:
            equal = same(_newest(here), _newest(there))
            found.append(
                Claim(f"{stage}: weights and optimizer equal to the bit", equal, f"{len(_newest(here))} pieces")
            )
    one, other = (load_file(path / "model.safetensors") for path in _converted(run, undisturbed))
    found.append(Claim("convert: weights equal to the bit", same(one, other), f"{len(one)} tensors"))
    return found


def _audited(stage: str, folder: Path) -> Claim:
    told = audit(folder)
    starts = f"{len(told.ranks)} starts in the lineage, on {_listed_ranks(told.ranks)}"
    found = f"{told.positions} positions, {told.sources[0].epochs} whole epochs, {starts}"
    if told.counts:
        found += f"; {told.counts}: {'; '.join(misfit.reason for misfit in told.misfits[:3])}"
    return Claim(
        f"{stage}: each position once, each sample once an epoch, but for the quarantine list", not told.counts, found
    )


def _listed_ranks(ranks: list[int]) -> str:
    return f"{', '.join(map(str, sorted(set(ranks))))} ranks"


def _quarantined(stage: str, folder: Path, broken: set[str]) -> Claim:
    keys = [json.loads(line)["key"] for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    holds = set(keys) == broken and len(keys) == len(broken)
    odd = sorted(set(keys) ^ broken)[:5]
    found = f"{len(keys)} listed, {len(broken)} planted" + (f"; differ in {', '.join(odd)}" if odd else "")
    return Claim(f"{stage}: the quarantine list is what was planted", holds, found)


def _one_history(stage: str, folder: Path) -> Claim:
    samples = [at for at, _ in losses(folder)]
    return Claim(f"{stage}: each step is logged once", samples == sorted(set(samples)), f"{len(samples)} lines")


def _losses(stage: str, here: Path, there: Path) -> Claim:
    one, other = dict(losses(here)), dict(losses(there))
    if one.keys() != other.keys():
        return Claim(f"{stage}: losses within {TOLERANCE}", False, "logged at other samples")
    far = max(abs(one[at] - other[at]) for at in one)
    return Claim(f"{stage}: losses within {TOLERANCE}", far <= TOLERANCE, f"{far:.1e} at most, of {one[max(one)]:.3f}")


def _newest(stage: Path) -> dict:
    return weights_of(max((stage / "checkpoints").glob("samples-*")))


def _converted(run: Submitted, undisturbed: Path) -> tuple[Path, Path]:
    return run.stage("convert"), undisturbed / "stages" / "convert"


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
