"""What a run's folder holds, and the folder of a training stage that was run by hand: read, nothing computed."""

import json
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.settings import read_toml
from pipeline.telemetry import read_metrics
from shards.errors import UserError

TRAINING = ("masked_patch", "mae", "supervised", "finetune")  # kinds of stages


@dataclass(frozen=True)
class Stage:
    """A stage of a run, finished or not.

    Attributes:
        name: Of its folder.
        kind: As plans have it.
        folder: Of the stage.
        table: Its ``[[stage]]`` of the plan; empty for a stage that was run by hand.
        result: What its command told in the end; None: it has not ended.
        seconds: That its last try took.
    """

    name: str
    kind: str
    folder: Path
    table: dict[str, Any]
    result: dict[str, Any] | None
    seconds: float | None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings of a training stage, every one of them; empty where it has not begun."""
        path = self.folder / "resolved.toml"
        return read_toml(path) if path.is_file() else {}

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """What a training stage has logged."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def told(self) -> dict[str, Any]:
        """What the command of a finished stage told in the end."""
        return self.result or {}

    @property
    def samples(self) -> int:
        """What a training stage has seen."""
        return self.lines[-1]["samples"] if self.lines else 0

    @property
    def val(self) -> dict[str, float] | None:
        """What a training stage last told of held-out images; None: it has not, or there are none."""
        if self.result is not None:
            return self.result.get("val")
        found: dict[str, Any] = next((line for line in reversed(self.lines) if "val_loss" in line), {})
        return {key.removeprefix("val_"): value for key, value in found.items() if key.startswith("val_")} or None


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        folder: Of the run.
        name: Of the folder: that of the plan, or of a stage that was run by hand.
        plan: The plan file's text; None for a stage that was run by hand.
        stages: By name, in the plan's order; those of a sweep are ``NAME-0``, ``NAME-1`` and so on.
        sweeps: Names of the stages of each sweep.
    """

    folder: Path
    name: str
    plan: str | None
    stages: dict[str, Stage]
    sweeps: dict[str, list[str]]

    @cached_property
    def trials(self) -> set[str]:
        """Names of the sweeps that another stage takes the best of: their held-out images chose its settings."""
        stages = tomllib.loads(self.plan)["stage"] if self.plan else []
        return {stage["best"] for stage in stages if "best" in stage}

    def of(self, *kinds: str) -> list[Stage]:
        """Return the stages of these kinds that have left anything."""
        return [s for s in self.stages.values() if s.kind in kinds and (s.result is not None or s.lines)]

    def finished(self, *kinds: str) -> list[Stage]:
        """Return the finished stages of these kinds."""
        return [s for s in self.stages.values() if s.kind in kinds and s.result is not None]

    def named(self, name: str) -> Stage | None:
        """Return a stage by the name that a plan calls it: of a sweep the best one."""
        if name in self.sweeps:
            return best([self.stages[each] for each in self.sweeps[name]])
        return self.stages.get(name)

    def at(self, path: str) -> Stage | None:
        """Return the stage that a path is of; the run may have been moved since the path was written."""
        parts = Path(path).parts
        for place in (i for i, part in enumerate(parts) if part == "stages"):
            of_this = parts[place - 1 : place] == (self.folder.resolve().name,)
            if of_this and len(parts) > place + 1 and parts[place + 1] in self.stages:
                return self.stages[parts[place + 1]]
        return None


def best(stages: list[Stage]) -> Stage | None:
    """Return the stage whose held-out images came out best, by top-1, else by loss; of equals the first.

    The first stage where none has told of any; None where there is no stage.
    """

    def score(stage: Stage) -> tuple[bool, float]:
        val = stage.val or {}
        return bool(val), val["top1"] if "top1" in val else -val.get("loss", 0.0)

    return max(stages, key=score) if stages else None


def read_run(folder: str | Path) -> Run:
    """Read a run, or a training stage that was run by hand.

    Raises:
        UserError: The folder is neither, or a file in it is damaged.
    """
    folder = Path(folder)
    with reading(folder):
        return _of_plan(folder) if (folder / "plan.toml").is_file() else _by_hand(folder)


@contextmanager
def reading(*folders: Path) -> Iterator[None]:
    """Turn what comes of files that say something else than Patchmill wrote into an error for the user."""
    what = ", ".join(map(str, folders))
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or what}: {error.strerror or error}; mend that") from error
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} tells what no run does ({told}); was a file in it changed or damaged?") from error


def _of_plan(folder: Path) -> Run:
    text = (folder / "plan.toml").read_text(encoding="utf-8")
    plan = read_toml(folder / "plan.toml")
    stages: dict[str, Stage] = {}
    sweeps: dict[str, list[str]] = {}
    for table in plan["stage"]:
        names = [table["name"]]
        if "sweep" in table:
            numbered = (f"{table['name']}-{number}" for number in count())
            names = sweeps[table["name"]] = []
            for name in numbered:
                if not (folder / "stages" / name).is_dir():
                    break
                names.append(name)
        for name in names:
            stages[name] = _stage(name, folder / "stages" / name, table)
    return Run(folder, folder.resolve().name, text, stages, {name: each for name, each in sweeps.items() if each})


def _stage(name: str, folder: Path, table: dict[str, Any]) -> Stage:
    path = folder / "result.json"
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return Stage(name, table["kind"], folder, table, told.get("result"), told.get("seconds"))


def _by_hand(folder: Path) -> Run:
    if not (folder / "resolved.toml").is_file():
        raise UserError(
            f"{folder} is no run: it holds no plan.toml; give the folder RUNS/NAME that `patchmill run` made, or one "
            "of `patchmill train`"
        )
    name = folder.resolve().name
    stage = Stage(name, read_toml(folder / "resolved.toml")["kind"], folder, {}, None, None)
    return Run(folder, name, None, {name: stage}, {})
