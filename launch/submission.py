"""What ``patchmill submit`` leaves in a run's folder, for its jobs and for who asks how they are.

RUN/plan.toml   slurm/{submission.json, plan.toml, recipes/, code/, NAME.sbatch, NAME.log, NAME.json, NAME.begun,
                       NAME.doctor/}
"""

import json
import os
from pathlib import Path
from typing import Any

from launch.cluster import JobSettings
from launch.inputs import is_beside
from launch.plan import Plan, read_submitted
from launch.results import read_json
from pipeline.settings import Settings, check
from shards.atomic import write_text
from shards.errors import UserError


class Job(Settings):
    """One job, or one task of an array.

    Attributes:
        id: As Slurm's commands take it: ``12``, or ``12_3`` of an array.
        stage: That it runs.
        slice: ``I/N``, of a build of shards in slices; ``merge``: it ends such a build.
        digest: Of the stage when it was submitted; None: a sweep is to settle it.
        needs: Names of the jobs that it waits for.
        settings: From the profile.
    """

    id: str
    stage: str
    needs: tuple[str, ...] = ()
    slice: str | None = None
    digest: str | None = None
    settings: JobSettings


class Submission(Settings):
    """All jobs of a run, and what they go by.

    Attributes:
        plan: Path of the plan's file; its text then is ``RUN/slurm/plan.toml``.
        name: Of the run; it begins the names of its jobs in the queue.
        smoke: As of ``patchmill run``.
        known: Digests of the plan's inputs, by path.
        recipes: Names in ``RUN/slurm/recipes`` of copies of the recipes beside the plan, by the name that stages have.
        cluster: That has the jobs, by Slurm's name of it; None: not noted.
        uid: Of who submitted them; None: not noted.
        jobs: By name, in the plan's order.
    """

    plan: str
    name: str
    smoke: bool
    known: dict[str, str]
    recipes: dict[str, str]
    cluster: str | None = None
    uid: int | None = None
    jobs: dict[str, Job]

    def read_plan(self, run: Path) -> Plan:
        """Return the plan as it was submitted."""
        text = (folder_of(run) / "plan.toml").read_text(encoding="utf-8")
        recipes = {name: _recipes_of(run) / copy for name, copy in self.recipes.items()}
        return read_submitted(text, Path(self.plan), run, self.smoke, dict(self.known), recipes)

    def write(self, run: Path) -> None:
        """Write it into the run's folder."""
        write_text(folder_of(run) / "submission.json", self.model_dump_json(indent=1, exclude_unset=True))


def keep_plan(plan: Plan) -> dict[str, str]:
    """Copy a plan, and the recipes beside it, for its jobs; return ``Submission.recipes``."""
    names = sorted({stage.recipe for stage in plan.table.stage if stage.recipe and is_beside(stage.recipe)})
    copies = {name: f"{number}-{Path(name).name}" for number, name in enumerate(names)}  # two folders may have one each
    for name, copy in copies.items():
        _copy(plan.path.parent / name, _recipes_of(plan.run) / copy)
    _copy(plan.path, folder_of(plan.run) / "plan.toml")
    return copies


def _copy(source: Path, target: Path) -> None:
    write_text(target, source.read_text(encoding="utf-8"))


def _recipes_of(run: Path) -> Path:
    return folder_of(run) / "recipes"


def folder_of(run: Path) -> Path:
    """Return where scripts, logs and records of a run's jobs are."""
    return run / "slurm"


def log_of(run: Path, name: str) -> Path:
    """Return where a job of a run writes what it says."""
    return folder_of(run) / f"{name}.log"


def logs_of(run: Path, job: Job) -> Path:
    """Return where the ranks of a job log; as long as they live, they share the lock of it."""
    folder = run / "stages" / job.stage / "logs"
    return folder / f"slice-{job.slice.partition('/')[0]}" if job.slice else folder  # of several at once


def begun_of(run: Path, name: str) -> Path:
    """Return the file that the script of a job makes when it begins, and ``launch.job`` removes when it does.

    It holds how often Slurm has put the job back by then, and how many bytes its log had.
    """
    return folder_of(run) / f"{name}.begun"


def read_submission(run: Path) -> Submission | None:
    """Return the last submission of a run; None: there was none."""
    remedy = f"no other tells the numbers of jobs: end those named {run.resolve().name}:... by scancel, then remove it"
    table = read_json(folder_of(run) / "submission.json", remedy)
    return check(Submission, table, str(run)) if table else None


def read_submitted_plan(run: Path) -> Plan:
    """Return the plan of a run as it was submitted.

    Raises:
        UserError: The folder is no run's, or it was not submitted.
    """
    check_run(run)
    if (submission := read_submission(run)) is None:
        raise UserError(f"{run} was never submitted; give the file of its plan")
    return submission.read_plan(run.resolve())


def check_run(run: Path) -> None:
    """Check that a folder is a run's.

    Raises:
        UserError: It is not.
    """
    if not (run / "plan.toml").is_file():
        raise UserError(
            f"{run} is no run: it holds no plan.toml; give the folder RUNS/NAME of `patchmill run` or submit"
        )


class Record:
    """What is known of the tries of a job, in ``NAME.json``; the job's last try alone writes it.

    Attributes:
        table: ``state`` (starting, running, stopped, crashed, failed, done), ``tries``, ``job`` (Slurm's number of the
            last), ``barren`` (tries in a row that came no further than the one before), ``at`` (where the last began:
            samples, or finished shards), ``nodes`` and ``reason``. While only the script of a try has begun, it is
            ``starting``; a job that ended so has failed, with that reason.
    """

    def __init__(self, run: Path, name: str):
        self.run, self.name, self.path = run, name, folder_of(run) / f"{name}.json"
        self._begun = begun_of(run, name)
        self.table: dict[str, Any] = read_json(self.path)
        if mark := self._mark():
            said = _last_line(log_of(run, name), mark[1])
            self.table |= {"state": "starting", "reason": f"in its script, before launch.job{said and f': {said}'}"}

    def begin(self, at: int) -> int:
        """Note that a try begins, with so much behind it; return how many came no further, with this one."""
        barren = self.table.get("barren", 0) if at <= self.table.get("at", 0) else 0
        tries, job = self.table.get("tries", 0) + 1, os.environ.get("SLURM_JOB_ID")
        nodes = os.environ.get("SLURM_JOB_NODELIST", "")
        self._write(state="running", tries=tries, job=job, barren=barren + 1, at=at, nodes=nodes, reason=None)
        return barren + 1

    def forget(self) -> None:
        """Remove it, as of a job before."""
        self.path.unlink(missing_ok=True)
        self._begun.unlink(missing_ok=True)

    def is_superseded(self) -> bool:
        """Tell whether another try has begun since this one: Slurm starts one when it loses a node that lives on."""
        now, mark = read_json(self.path), self._mark()
        here = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        return any(now.get(key) != self.table.get(key) for key in ("tries", "job")) or bool(mark and mark[0] > here)

    def note(self, state: str, **more: Any) -> None:
        """Note how it is, unless that is for another try to tell."""
        if not self.is_superseded():
            self._write(state=state, **more)

    def excuse(self, state: str, reason: str) -> None:
        """Note that the try was ended from outside, which is no fault of it."""
        self.note(state, barren=max(0, self.table.get("barren", 0) - 1), reason=reason)

    def _mark(self) -> tuple[int, int] | None:
        """Return what the script of the try that began last noted, unless that has come to ``launch.job``."""
        try:
            restarts, size, *_ = [*self._begun.read_text().split(), "0", "0"]  # it may be at it just now
        except FileNotFoundError:
            return None
        return int(restarts), int(size)

    def _write(self, **more: Any) -> None:
        self.table |= more
        write_text(self.path, json.dumps(self.table))
        self._begun.unlink(missing_ok=True)


def _last_line(log: Path, start: int) -> str:
    """Return the last line that says anything from a byte on."""
    text = log.read_bytes()[start:].decode(errors="replace") if log.exists() else ""
    return next((line.strip() for line in reversed(text.split("\n")) if line.strip()), "")
