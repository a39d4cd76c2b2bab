"""Which stages of a plan are to run, and what would happen to each."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from launch.plan import Plan, Stage
from launch.results import read_json, result_of
from pipeline.settings import nearest
from shards.errors import UserError


def chosen(plan: Plan, only: str | None) -> set[str]:
    """Return the names of the stages to run: all of them, or those that a name means alone.

    Raises:
        UserError: There is no such stage, or what it needs has not finished.
    """
    if only is None:
        return {stage.table.name for stage in plan.stages}
    names = meant(plan, only)
    done = {stage.table.name for stage in plan.stages if is_done(stage)}
    needed = dict.fromkeys(need for stage in plan.stages if stage.table.name in names for need in stage.needs)
    if missing := [need for need in needed if need not in done and need not in names]:
        raise UserError(
            f"--only {only} needs {', '.join(missing)}, which {'has' if len(missing) == 1 else 'have'} not finished "
            "with these settings; run the plan without --only"
        )
    return names


def anew(plan: Plan, start: str | None) -> set[str]:
    """Return the names of the stages to be made anew whatever they are: those that a name means, and all that follow.

    Raises:
        UserError: There is no such stage.
    """
    return with_followers(plan, meant(plan, start) if start is not None else set())


def with_followers(plan: Plan, names: set[str]) -> set[str]:
    """Return the names of some stages and of all that follow them."""
    names = set(names)
    for stage in plan.stages:  # in the order of their needs
        if names & set(stage.needs):
            names.add(stage.table.name)
    return names


def meant(plan: Plan, name: str) -> set[str]:
    """Return the stages that a name means: one, or all of a sweep."""
    names = {stage.table.name for stage in plan.stages if name in (stage.table.name, stage.sweep and stage.sweep.name)}
    if not names:
        known = list(dict.fromkeys(each for stage in plan.stages for each in _names(stage)))
        raise UserError(f"{plan.path} has no stage {name!r}{nearest(name, known)}; it has {', '.join(known)}")
    return names


def _names(stage: Stage) -> Iterable[str]:
    return [stage.sweep.name, stage.table.name] if stage.sweep else [stage.table.name]


def is_done(stage: Stage) -> bool:
    """Tell whether a stage finished with these settings and inputs."""
    return result_of(stage.folder, stage.digest) is not None


def to_do(plan: Plan, names: set[str], again: set[str]) -> bool:
    """Tell whether anything is to run, of the stages that are chosen: they are not done, or made anew."""
    return any(stage.table.name in again or not is_done(stage) for stage in plan.stages if stage.table.name in names)


def goes_on(stage: Stage) -> bool:
    """Tell whether what is there of a stage is of an unfinished try with the same inputs, or nothing is.

    Settings may have changed since: pipeline/resume.py says which may.
    """
    return (
        not result_of(stage.folder)
        and read_json(stage.folder / "inputs.json").get("inputs", stage.inputs) == stage.inputs
    )


def print_choice(plan: Plan, names: set[str], again: set[str]) -> None:
    """Print on stdout what a run would do, stage by stage; of what comes after a sweep, as far as is known."""
    table = Table("stage", "kind", "ranks", "what happens", title=str(plan.run), title_justify="left")
    for stage in plan.stages:
        table.add_row(stage.table.name, stage.table.kind, str(stage.table.ranks), _fate(stage, names, again))
    Console().print(table)


def _fate(stage: Stage, names: set[str], again: set[str]) -> str:
    if stage.table.name not in names:
        return "left out"
    if stage.table.name in again and stage.folder.exists():
        return "made anew"
    if is_done(stage):
        return "done before, skipped"
    if not stage.folder.exists():
        return "runs"
    return "goes on" if goes_on(stage) else "made anew: settings or inputs changed"
