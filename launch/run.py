"""Run a plan on this machine, stage by stage, skipping what is done."""

import json
import sys
import time

from rich.console import Console

from launch.local import run_ranks
from launch.plan import Plan, Stage, after_a_sweep
from launch.results import read_json, result_of
from pipeline.config import TrainSettings
from pipeline.settings import dump_toml
from shards.atomic import write_text
from shards.errors import PatchmillError, StoppedOnRequestError, UserError

FAMILY = {2: UserError, 75: StoppedOnRequestError}


def run_plan(plan: Plan) -> None:
    """Run every stage that is not finished; one that was killed goes on from its last checkpoint.

    Raises:
        PatchmillError: A stage failed; its own message is already on stderr.
    """
    say = Console(stderr=True, highlight=False)
    plan.run.mkdir(parents=True, exist_ok=True)
    write_text(plan.run / "plan.toml", plan.path.read_text(encoding="utf-8"))
    for number in range(len(plan.stages)):
        stage = plan.stages[number]
        title = f"[{number + 1}/{len(plan.stages)}] {stage.table.name}"
        if is_done(stage):
            say.print(f"{title}: done before, skipped", style="dim", markup=False)
        else:
            ranks = f", {stage.table.ranks} ranks" if stage.table.ranks > 1 else ""
            say.print(f"{title} ({stage.table.kind}{ranks})", style="bold", markup=False)
            began = time.monotonic()
            _run(stage)
            say.print(f"{title}: done in {time.monotonic() - began:.0f} s", style="green", markup=False)
        if stage.sweep and stage.table.name == stage.sweep.members[-1]:
            results = [result_of(plan.run / "stages" / name) for name in stage.sweep.members]
            say.print(f"{stage.sweep.name}: {stage.sweep.summary(results)}", style="bold", markup=False)
            plan = after_a_sweep(plan)


def is_done(stage: Stage) -> bool:
    """Tell whether a stage finished with these settings and inputs."""
    return result_of(stage.folder, stage.digest) is not None


def begin(stage: Stage) -> None:
    """Make a stage's folder ready, with its settings; what another plan made there goes out of the way."""
    _set_aside(stage)
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_text(stage.folder / "inputs.json", json.dumps({"inputs": stage.inputs}))
    if isinstance(stage.settings, TrainSettings):
        write_text(stage.folder / "config.toml", dump_toml(stage.settings.model_dump(mode="json", exclude_unset=True)))


def finish(stage: Stage, stdout: str, seconds: float) -> None:
    """Note that a stage is done, with the result that is the last line of its stdout."""
    result = {"digest": stage.digest, "kind": stage.table.kind, "seconds": seconds}
    result["result"] = json.loads(stdout.strip().splitlines()[-1])
    write_text(stage.folder / "result.json", json.dumps(result, indent=1))


def _run(stage: Stage) -> None:
    began = time.monotonic()
    begin(stage)
    code, stdout = run_ranks([*stage.arguments, "--json"], stage.table.ranks, stage.folder / "logs")
    if code:
        remedy = {2: "mend it", 75: "all is saved"}.get(code, f"see {stage.folder / 'logs'}")
        raise FAMILY.get(code, PatchmillError)(
            f"stage {stage.table.name} ended with exit code {code}; {remedy}, then run the same command again to go on"
        )
    finish(stage, stdout, time.monotonic() - began)


def _set_aside(stage: Stage) -> None:
    """Move what another plan made out of the way: a finished stage, or an unfinished one that had other inputs.

    An unfinished stage with the same inputs goes on in place; pipeline/resume.py says what may then change.
    """
    if (
        not result_of(stage.folder)
        and read_json(stage.folder / "inputs.json").get("inputs", stage.inputs) == stage.inputs
    ):
        return
    number = 1
    while (aside := stage.folder.with_name(f"{stage.table.name}.before-{number}")).exists():
        number += 1
    stage.folder.rename(aside)
    print(f"settings or inputs of {stage.table.name} changed: what it made before is kept in {aside}", file=sys.stderr)
