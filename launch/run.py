"""Run a plan on this machine, stage by stage, skipping what is done."""

import json
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from launch.choice import anew, chosen, goes_on, is_done, to_do, with_followers
from launch.lastwords import LastWords
from launch.launchers import LOCAL, Launch, code_of
from launch.plan import Plan, Stage, after_a_sweep
from launch.results import read_json, result_of
from pipeline.config import TrainSettings
from pipeline.settings import dump_toml
from shards.atomic import is_held, only_one, write_text
from shards.errors import StoppedOnRequestError, UserError, error_of

WAIT = 60.0  # seconds for another run of the same stage, which may be on its way out
RUNNER = "runner"  # in a stage's logs: locked by the patchmill run that is at it, as long as it lives
STATE = "state.json"


def run_plan(plan: Plan, start: str | None = None, only: str | None = None, launch: Launch = LOCAL) -> None:
    """Run every stage that is not finished; one that was killed goes on from its last checkpoint.

    Args:
        plan: To run.
        start: A stage or sweep to make anew, and with it all that follows, finished or not.
        only: A stage or sweep that alone is run.
        launch: How ranks are started; where it goes over several nodes, this is node 0.

    Raises:
        UserError: There is no such stage, or what is to run needs others that have not finished.
        PatchmillError: A stage failed; its own message is already on stderr.
    """
    names, again = chosen(plan, only), anew(plan, start)
    with launch.leading() if to_do(plan, names, again) else nullcontext():  # else the others do not follow
        _run_plan(plan, names, again, launch)


def _run_plan(plan: Plan, names: set[str], again: set[str], launch: Launch) -> None:
    say = Console(stderr=True, highlight=False)
    changed = {stage.table.name for stage in plan.stages if not (is_done(stage) or goes_on(stage))}
    going = with_followers(plan, again | changed & names)
    check_unused(stage.folder for stage in plan.stages if stage.table.name in going)
    plan.run.mkdir(parents=True, exist_ok=True)
    write_text(plan.run / "plan.toml", plan.path.read_text(encoding="utf-8"))
    set_aside_what_sweeps_lost(plan)
    for stage in plan.stages:
        if stage.table.name in again and stage.folder.exists():  # all at once: a kill must not leave some for done
            print(
                f"{stage.table.name} is made anew: what it made before is kept in {_keep(stage.folder)}",
                file=sys.stderr,
            )
    for number in range(len(plan.stages)):
        stage = plan.stages[number]
        title = f"[{number + 1}/{len(plan.stages)}] {stage.table.name}"
        if stage.table.name not in names:
            continue
        if is_done(stage):
            say.print(f"{title}: done before, skipped", style="dim", markup=False)
        else:
            ranks = f", {stage.table.ranks} ranks" if stage.table.ranks > 1 else ""
            say.print(f"{title} ({stage.table.kind}{ranks})", style="bold", markup=False)
            began = time.monotonic()
            _run(stage, launch)
            say.print(f"{title}: done in {time.monotonic() - began:.0f} s", style="green", markup=False)
        ran = {each.table.name: each for each in plan.stages[: number + 1]}
        if stage.sweep and ran.keys() >= set(stage.sweep.members) <= names:
            results = [told for name in stage.sweep.members if (told := result_of(ran[name].folder)) is not None]
            text = f"{stage.sweep.name}: {stage.sweep.summary(results)}"
            say.print(text, style="bold", markup=False, soft_wrap=True)
            plan = after_a_sweep(plan, len(ran))


def begin(stage: Stage) -> None:
    """Make a stage's folder ready, with its settings; what another plan made there goes out of the way."""
    _set_aside(stage)
    stage.folder.mkdir(parents=True, exist_ok=True)
    write_text(stage.folder / "inputs.json", json.dumps({"inputs": stage.inputs}))
    if isinstance(stage.settings, TrainSettings):
        write_text(stage.folder / "config.toml", dump_toml(stage.settings.model_dump(mode="json", exclude_unset=True)))


def check_unused(folders: Iterable[Path]) -> None:
    """Check that no ``patchmill run`` is at any of some stages, by their folders.

    Raises:
        UserError: One is.
    """
    for folder in folders:
        if is_held(folder / "logs" / RUNNER, unknown=False):
            raise UserError(f"a `patchmill run` is at {folder}; wait for it, or stop it")


def note(folder: Path, state: str, reason: str = "") -> None:
    """Write into a stage's folder how it is, for ``patchmill status``: running, stopped or failed."""
    write_text(folder / STATE, json.dumps({"state": state, "reason": reason}))


def noted(folder: Path) -> dict[str, str]:
    """Return what the last ``patchmill run`` noted of a stage; nothing where there was none since it was submitted."""
    return read_json(folder / STATE)


def forget(folder: Path) -> None:
    """Remove what was noted of a stage, as a job is to run it now."""
    (folder / STATE).unlink(missing_ok=True)


def finish(stage: Stage, stdout: str, seconds: float) -> None:
    """Note that a stage is done, with the result that is the last line of its stdout."""
    result = {"digest": stage.digest, "kind": stage.table.kind, "seconds": seconds}
    result["result"] = json.loads(stdout.strip().splitlines()[-1])
    write_text(stage.folder / "result.json", json.dumps(result, indent=1))


def set_aside_what_sweeps_lost(plan: Plan) -> None:
    """Move runs out of the way that a sweep had when it was longer: a report would have them still."""
    for sweep in {stage.sweep.name: stage.sweep for stage in plan.stages if stage.sweep}.values():
        for folder in sorted((plan.run / "stages").glob(f"{sweep.name}-*")):
            number = folder.name.removeprefix(f"{sweep.name}-")
            if number.isdecimal() and folder.name not in {stage.table.name for stage in plan.stages}:
                aside = _keep(folder)
                print(
                    f"sweep {sweep.name} has no {folder.name} any more: what it made is kept in {aside}",
                    file=sys.stderr,
                )


def _run(stage: Stage, launch: Launch) -> None:
    began, logs = time.monotonic(), stage.folder / "logs"
    begin(stage)
    words = LastWords([logs / "launcher-0.log", *(logs / f"rank-{rank}.log" for rank in range(stage.table.ranks))])
    with only_one(logs / RUNNER, "patchmill run", wait=WAIT, told=True):
        note(stage.folder, "running")
        try:
            code, stdout = launch.run([*stage.arguments, "--json"], stage.table.ranks, stage.folder)
        except BaseException as error:
            note(stage.folder, _ended(code_of(error)), str(error))
            raise
        if code:
            note(stage.folder, _ended(code), words.error())
            remedies = {UserError.exit_code: "mend it", StoppedOnRequestError.exit_code: "all is saved"}
            remedy = remedies.get(code, f"see {logs}")
            raise error_of(code)(
                f"stage {stage.table.name} ended with exit code {code}; {remedy}, then run the same command again to "
                "go on"
            )
        finish(stage, stdout, time.monotonic() - began)


def _ended(code: int) -> str:
    return "stopped" if code == StoppedOnRequestError.exit_code else "failed"


def _set_aside(stage: Stage) -> None:
    """Move what another plan made out of the way: a finished stage, or an unfinished one that had other inputs."""
    if goes_on(stage):
        return
    aside = _keep(stage.folder)
    print(f"settings or inputs of {stage.table.name} changed: what it made before is kept in {aside}", file=sys.stderr)


def _keep(folder: Path) -> Path:
    """Give a stage's folder a name that no stage has, and return it; not under the feet of who is at it."""
    check_unused([folder])
    number = 1
    while (aside := folder.with_name(f"{folder.name}.before-{number}")).exists():
        number += 1
    folder.rename(aside)
    return aside
