"""Plans: data sets and stages in one TOML file, checked as a whole before anything starts."""

import graphlib
import os
import re
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from launch.inputs import Inputs
from launch.results import digest, result_of
from launch.stages import KINDS
from launch.sweep import Sweep, sweep_of
from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.convert.source import Source
from pipeline.recipe import read_settings
from pipeline.settings import Settings, check, flat, merge, nearest, read_toml
from pipeline.weights import check_model, resolve_model
from shards.errors import UserError
from shards.sources.open import find_kind
from shards.tarlist import find_tars
from shards.tarstream import PIPE, STDIN, is_stream
from shards.urls import refuse_secrets

PLACEHOLDER = re.compile(r"\{([A-Za-z0-9_-]+)\}")
NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class StageTable(Settings):
    """One ``[[stage]]`` table."""

    name: str = Field(pattern=NAME, description="of its folder, `runs/PLAN/stages/NAME`, and where others name it")
    kind: str = Field(description=f"what it does: {', '.join(KINDS)}")
    recipe: str | None = Field(None, description="by name, or a TOML file of settings beside the plan")
    init: str | None = Field(None, description="stage whose weights this one starts from, or a path of some")
    sweep: str | dict[str, Any] | list[dict[str, Any]] | None = Field(
        None, description="lists of values by setting: the stage runs once for each; 'recipe': those of the recipe"
    )
    beside: dict[str, list[float | str]] = Field(
        {}, description="columns that a report puts beside the runs of the sweep: what others found"
    )
    best: str | None = Field(None, description="stage with a sweep whose best settings this one takes over")
    after: list[str] = Field([], description="stages to wait for, besides those that `{NAME}`, init and best name")
    ranks: int = Field(
        1, gt=0, description="processes; unless said, under `patchmill run` a training stage takes one for each GPU"
    )
    set: dict[str, Any] = Field(
        {}, description="settings of its kind, over those of the recipe; `{NAME}` in them is what stage NAME makes"
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"there is no such kind{nearest(kind, list(KINDS))}; the kinds are {', '.join(KINDS)}")
        return kind


class PlanTable(Settings):
    """A plan file."""

    name: str = Field(pattern=NAME, description="of the run's folder, `runs/NAME`")
    stage: list[StageTable] = Field(min_length=1)


@dataclass(frozen=True)
class Stage:
    """A stage ready to run.

    Attributes:
        table: As the plan has it.
        settings: Checked, with every ``{stage}`` replaced by that stage's output.
        needs: Names of the stages that must be finished first.
        digest: Of its settings and its inputs; a finished stage with the same digest is skipped.
        inputs: Digest of its inputs alone; an unfinished stage with the same goes on.
        folder: Its folder in the run.
        arguments: Its ``patchmill`` command line.
        sweep: That it is a run of.
    """

    table: StageTable
    settings: Settings
    needs: list[str]
    digest: str
    inputs: str
    folder: Path
    arguments: list[str]
    sweep: Sweep | None


@dataclass(frozen=True)
class Plan:
    """A checked plan and where it runs; ``only``: the stage or sweep that alone is to run here."""

    path: Path
    table: PlanTable
    run: Path
    smoke: bool
    stages: list[Stage]
    inputs: Inputs
    only: str | None = None


def read_plan(
    path: str | Path,
    runs: str | Path = "runs",
    smoke: bool = False,
    ranks: int | None = None,
    unsaid: int = 1,
    only: str | None = None,
) -> Plan:
    """Read and check a plan.

    Args:
        path: The TOML file. Relative paths in it count from its folder.
        runs: Folder that holds the run's folder, ``RUNS/NAME``.
        smoke: Shrink every training stage; the run's folder is then ``RUNS/NAME-smoke``.
        ranks: Of every stage that can have several, in place of the plan's.
        unsaid: Ranks of a training stage of which the plan does not say how many.
        only: Stage or sweep that alone is to run; the batches of others need not divide over ranks.

    Raises:
        UserError: Anything wrong with any stage.
    """
    path = Path(path)
    table = check(PlanTable, read_toml(path), str(path))
    table = table.model_copy(update={"stage": [_with_ranks(stage, ranks, unsaid, path) for stage in table.stage]})
    run = Path(runs).resolve() / (f"{table.name}-smoke" if smoke else table.name)
    return _plan(path, table, run, smoke, Inputs(path.parent), only=only)


def read_submitted(
    text: str, path: Path, run: Path, smoke: bool, known: dict[str, str], recipes: dict[str, Path]
) -> Plan:
    """Return a plan as it was when it was submitted.

    Args:
        text: Of its file, then.
        path: Where that was.
        run: The run's folder.
        smoke: As of ``read_plan``.
        known: Digests of its inputs, then.
        recipes: Copies of the recipes beside it, made then.

    Raises:
        UserError: It does not fit any more: the tars that it streams are gone.
    """
    table = check(PlanTable, tomllib.loads(text), str(path))
    return _plan(path, table, run, smoke, Inputs(path.parent, known, recipes))


def after_a_sweep(plan: Plan, ran: int = 0) -> Plan:
    """Return the plan with what the sweeps found that have ended by now: it settles what comes after them.

    The first ``ran`` stages stay as they are: what they were made of may have changed since, and they were not.
    """
    return _plan(plan.path, plan.table, plan.run, plan.smoke, plan.inputs, plan.stages[:ran], plan.only)


def _plan(
    path: Path,
    table: PlanTable,
    run: Path,
    smoke: bool,
    files: Inputs,
    ran: list[Stage] | None = None,
    only: str | None = None,
) -> Plan:
    sweeps: dict[str, Sweep] = {}
    for stage in table.stage:
        if stage.sweep is not None:
            sweeps[stage.name] = _sweep(stage, path, sweeps, files)
        elif stage.beside:
            raise UserError(f"stage {stage.name} of {path} has no sweep to put beside of; remove beside")
    runs = [each for stage in table.stage for each in _runs_of(stage, sweeps.get(stage.name))]
    for stage in table.stage:
        if stage.best is not None and stage.best not in sweeps:
            raise UserError(f"best of stage {stage.name} of {path} is {stage.best!r}, which is no stage with a sweep")
        if stage.best is not None and KINDS[stage.kind].settings is not TrainSettings:
            raise UserError(
                f"stage {stage.name} of {path} has best, but a stage of kind {stage.kind} takes none; remove it"
            )
    names = [stage.name for stage in runs] + list(sweeps)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two stages of {path} are named {twice!r}; rename one")

    by_name = {stage.name: stage for stage in runs}
    of_sweep = {name: sweep for sweep in sweeps.values() for name in sweep.members}
    stages = {stage.table.name: stage for stage in ran or []}
    for name in _in_order(by_name, sweeps, path):
        if name not in stages:
            sweep = of_sweep.get(name)
            stages[name] = _prepare(by_name[name], by_name, sweeps, stages, run, path, smoke, sweep, files)
            if only in (None, name, sweep and sweep.name):
                _check_ranks(stages[name], path)
    return Plan(path, table, run, smoke, list(stages.values()), files, only)


def _with_ranks(stage: StageTable, ranks: int | None, unsaid: int, path: Path) -> StageTable:
    kind = KINDS[stage.kind]
    if not kind.parallel:
        if stage.ranks > 1:
            raise UserError(
                f"stage {stage.name} of {path} has {stage.ranks} ranks, but a stage of kind {stage.kind} is one "
                "process; remove ranks"
            )
        return stage
    if ranks is None:
        ranks = unsaid if "ranks" not in stage.model_fields_set and kind.settings is TrainSettings else stage.ranks
    return stage.model_copy(update={"ranks": ranks})


def _sweep(stage: StageTable, path: Path, before: dict[str, Sweep], files: Inputs) -> Sweep:
    if KINDS[stage.kind].settings is not TrainSettings:
        raise UserError(
            f"stage {stage.name} of {path} has a sweep, but a stage of kind {stage.kind} takes none; remove it"
        )
    assert stage.sweep is not None
    sweep = sweep_of(stage.name, stage.sweep, stage.recipe and files.recipe(stage.recipe), before)
    for title, column in stage.beside.items():
        if len(column) != len(sweep.changes):
            raise UserError(
                f"stage {stage.name} of {path} has {len(sweep.changes)} runs, and {len(column)} values of {title!r} "
                "beside them; give one for each"
            )
    return sweep


def _runs_of(stage: StageTable, sweep: Sweep | None) -> list[StageTable]:
    if sweep is None:
        return [stage]
    return [
        stage.model_copy(update={"name": name, "set": merge(stage.set, sweep.settings(number))})
        for number, name in enumerate(sweep.members)
    ]


def _in_order(by_name: dict[str, StageTable], sweeps: dict[str, Sweep], path: Path) -> list[str]:
    """Return the names with every stage after what it needs, and else as the file has them."""
    needs = {name: _needs(stage, by_name, sweeps, path) for name, stage in by_name.items()}
    sorter = graphlib.TopologicalSorter(needs)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise UserError(
            f"the stages of {path} wait for each other: {' -> '.join(error.args[1])}; break the circle"
        ) from None
    ordered: list[str] = []
    ready: list[str] = []
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=list(by_name).index)
        ordered.append(ready.pop(0))
        sorter.done(ordered[-1])
    return ordered


def _takes(stage: StageTable) -> list[str]:
    """Return the stages, and those with sweeps, whose output or settings a stage takes."""
    named = [word for text in _strings(stage.set) for word in PLACEHOLDER.findall(text)]
    if stage.init is not None and not _is_path(stage.init):
        named.append(stage.init)
    return named if stage.best is None else [*named, stage.best]


def _needs(stage: StageTable, by_name: dict[str, StageTable], sweeps: dict[str, Sweep], path: Path) -> list[str]:
    named = [*stage.after, *_takes(stage)]
    named = [each for name in named for each in (sweeps[name].members if name in sweeps else [name])]
    for name in named:
        if name not in by_name:
            there = f"{nearest(name, [*by_name, *sweeps])}; name one of {', '.join([*by_name, *sweeps])}"
            there += f", or write ./{name} for a path" if name == stage.init else ""
            raise UserError(f"stage {stage.name} of {path} needs stage {name!r}, which is not there{there}")
    if stage.kind == "report":
        named += [name for name, other in by_name.items() if other.kind != "report"]
    return list(dict.fromkeys(named))


def _prepare(
    stage: StageTable,
    by_name: dict[str, StageTable],
    sweeps: dict[str, Sweep],
    ready: dict[str, Stage],
    run: Path,
    path: Path,
    smoke: bool,
    sweep: Sweep | None,
    files: Inputs,
) -> Stage:
    kind, folder = KINDS[stage.kind], run / "stages" / stage.name
    where = f"stage {stage.name} of {path}"
    needs = _needs(stage, by_name, sweeps, path)
    best = {name: _best(sweeps[name], ready, where) for name in _takes(stage) if name in sweeps}
    table = read_settings(files.recipe(stage.recipe))[0] if stage.recipe else {}
    if stage.best is not None:
        found = _handed_on(stage.best, by_name, sweeps, ready, where)
        if twice := next((key for key in flat(found) if key in flat(stage.set)), None):
            raise UserError(f"{where} has {twice} of its own, and from the best of {stage.best}; remove one")
        table = merge(table, found)
    table = merge(table, stage.set)
    if kind.settings is TrainSettings:
        table = {"kind": stage.kind, **table}
        if stage.init is not None:
            table["init"] = stage.init if _is_path(stage.init) else f"{{{stage.init}}}"
            _check_init(stage, by_name, sweeps, where)
    elif stage.init is not None:
        raise UserError(f"{where} has init, but a stage of kind {stage.kind} takes no init; remove it")
    inputs: dict[str, Any] = {name: ready[name].digest for name in needs}
    inputs |= {name: sweeps[name].members[number] for name, number in best.items()}
    filled = table
    for key in kind.paths:
        filled, inputs[key] = _with_path(filled, key, files, by_name, where)
    outputs = {  # of all: what the best of a sweep hands on may name stages that only those before it need
        name: str(stage.folder / KINDS[stage.table.kind].output(stage.settings)) for name, stage in ready.items()
    }
    outputs |= {name: outputs[sweeps[name].members[number]] for name, number in best.items()}
    settings = check(kind.settings, _filled(filled, outputs), where)
    command = kind.command(settings, folder, run)
    if isinstance(settings, TrainSettings):
        if settings.kind != stage.kind:
            raise UserError(f"{where} is of kind {stage.kind}, its settings of kind {settings.kind}; make them one")
        check_model(settings, where)
        settings.data.check_stream()
        _check_weights(settings, inputs["init"], where)
        command += ["--smoke"] if smoke else []
    return Stage(stage, settings, needs, digest([stage.kind, table, inputs]), digest(inputs), folder, command, sweep)


def _check_ranks(stage: Stage, path: Path) -> None:
    if not isinstance(stage.settings, TrainSettings):
        return
    try:
        stage.settings.accumulation(stage.table.ranks)
    except UserError as error:
        raise UserError(f"stage {stage.table.name} of {path}: {error}, or take another number of ranks") from None


def _best(sweep: Sweep, ready: dict[str, Stage], where: str) -> int:
    """Return which of a sweep's stages came out best; before all have ended, the first: what it hands on is checked."""
    stages = [ready[name] for name in sweep.members]
    if any(isinstance(stage.settings, TrainSettings) and stage.settings.data.val is None for stage in stages):
        raise UserError(f"{where} takes the best of {sweep.name}, which no held-out images tell; set data.val there")
    return sweep.best([result_of(stage.folder, stage.digest) for stage in stages]) or 0


def _handed_on(
    name: str, by_name: dict[str, StageTable], sweeps: dict[str, Sweep], ready: dict[str, Stage], where: str
) -> dict[str, Any]:
    """Return the settings of a sweep's best, those among them that it took over from the best of another."""
    sweep = sweeps[name]
    own, before = sweep.settings(_best(sweep, ready, where)), by_name[sweep.members[0]].best
    return own if before is None else merge(_handed_on(before, by_name, sweeps, ready, where), own)


def _check_init(stage: StageTable, by_name: dict[str, StageTable], sweeps: dict[str, Sweep], where: str) -> None:
    """Raise a UserError where a stage starts from one that makes no weights."""
    names = sweeps[stage.init].members if stage.init in sweeps else [stage.init]
    kind = by_name[names[0]].kind if names[0] in by_name else None
    if kind is not None and kind != "convert" and KINDS[kind].settings is not TrainSettings:
        raise UserError(
            f"init of {where} is {stage.init!r}, of kind {kind}, which makes no weights; name a stage that trains or "
            "converts"
        )


def _check_weights(settings: TrainSettings, digest: str | None, where: str) -> None:
    """Raise a UserError where weights that are no stage's are none that the stage can start from."""
    if digest is None or settings.init is None or not ("://" in settings.init or os.path.exists(settings.init)):
        return
    try:
        resolve_model(settings, _weights(settings.init, digest), num_classes=1)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@lru_cache(maxsize=8)
def _weights(path: str, digest: str) -> Source:
    """Return the model at a path, opened once for all runs of a sweep."""
    return open_source(path)


def _is_path(init: str) -> bool:
    return re.match(NAME, init) is None  # with a slash or a dot


def _with_path(
    table: dict[str, Any], key: str, files: Inputs, by_name: dict[str, StageTable], where: str
) -> tuple[dict[str, Any], Any]:
    """Return the table with the path at ``key`` made absolute, and a digest of what is there; stages' outputs stay.

    Where ``key`` holds a list of tables, it is done to the ``url`` of each, and there is a list of digests.
    """
    head, _, rest = key.partition(".")
    value = table.get(head)
    if rest and isinstance(value, dict):
        inner, found = _with_path(value, rest, files, by_name, where)
        return {**table, head: inner}, found
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        found = [_with_path(each, "url", files, by_name, where) for each in value]
        return {**table, head: [each for each, _ in found]}, [each for _, each in found]
    if not isinstance(value, str):
        return table, None
    if found := PLACEHOLDER.match(value):
        _check_part(value, found, by_name, where, files)
        return table, None
    if head == "train" and is_stream(value):
        return _with_stream(table, value, files, where)
    if "://" in value:
        refuse_secrets(value)
        return table, value
    there = files.folder / value
    if not files.has(there):
        raise UserError(
            f"{where}: there is no {there} ({key}); mend the path, relative ones count from the plan's folder"
        )
    return {**table, head: str(there)}, files.digest(there)


def _with_stream(table: dict[str, Any], value: str, files: Inputs, where: str) -> tuple[dict[str, Any], Any]:
    if value == STDIN:
        raise UserError(f"{where}: standard input comes once, and a plan may run again; give tars, or pipe:COMMAND")
    if value.startswith(PIPE) or "://" in value:
        return table, value
    store, tars = find_tars(files.folder / value)
    return {**table, "train": str(files.folder / value)}, [
        files.digest(Path(store.url) / tar, one_of_many=True) for tar in tars
    ]


def _check_part(value: str, found: re.Match, by_name: dict[str, StageTable], where: str, files: Inputs) -> None:
    """Check that ``{shards}/part`` names a part that its stage will make."""
    source = by_name.get(found[1])  # none of a sweep
    if source is None or source.kind != "shards":
        return
    images = str(source.set.get("source", ""))
    if PLACEHOLDER.search(images):
        return  # another stage makes it: nobody knows yet
    if "://" not in images:
        images = str(files.folder / images)
        if not Path(images).exists():
            return  # its shards are made, and it is gone
    kind = source.set.get("kind") or find_kind(images)
    if kind in ("cifar", "imagenet", "parquet"):
        return  # these may have parts of their own
    split = source.set.get("split") or {}
    parts = ["/train", *(f"/{part}" for part in split)] if split else [""]
    if value[found.end() :] not in parts:
        makes = " and ".join(f"{found[0]}{part}" for part in parts)
        raise UserError(f"{where}: stage {source.name} makes no {value}; it makes {makes}")


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inner for text in _strings(item)]


def _filled(value: Any, outputs: dict[str, str]) -> Any:
    if isinstance(value, str):
        return PLACEHOLDER.sub(lambda found: outputs[found[1]], value)
    if isinstance(value, dict):
        return {key: _filled(item, outputs) for key, item in value.items()}
    return [_filled(item, outputs) for item in value] if isinstance(value, list) else value
