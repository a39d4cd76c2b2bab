"""How a run is: from its folder alone, and with Slurm's queue where there is one."""

import datetime
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launch.results import result_of
from launch.run import RUNNER, noted
from launch.slurm import Queued, cancel, states, unseen
from launch.submission import Job, Record, Submission, check_run, log_of, read_submission
from launch.sweep import Sweep, sweep_of
from pipeline.report.run import reading
from pipeline.settings import Duration, read_toml
from pipeline.telemetry import read_metrics
from shards.atomic import is_held
from shards.errors import PatchmillError, UserError

WORDS = {"PENDING": "waiting", "RUNNING": "running", "COMPLETING": "ending", "CONFIGURING": "starting"}
DEAD = ("failed", "cancelled", "lost")
COLOURS = {"done": "green", "running": "bold", "failed": "red", "lost": "red", "cancelled": "yellow"}
SECONDS = 5.0  # between two looks
SILENCE = 10.0  # seconds in which a stage says nothing, after which it may have ended
GONE = 90.0  # seconds in which cancelled jobs should have ended; Slurm kills what does not listen after 30


@dataclass(frozen=True)
class Status:
    """How one stage is, or one slice of a build.

    Attributes:
        name: Of the stage.
        state: ``done``, ``running``, ``waiting``, ``stopped``, ``crashed`` (both will come back, if they are jobs),
            ``failed``, ``cancelled``, ``lost`` (its job or process is gone without a word), ``begun`` or ``not begun``.
        job: Its number, if it has one.
        step: Taken by now, of a training stage; likewise ``share`` of the way, in [0, 1], and ``images_per_second``.
        seconds_left: At that speed.
        restarts: How often the job came back.
        why: The last error, or what it waits for.
        log: Where it says more.
    """

    name: str
    state: str
    job: str | None = None
    step: int | None = None
    share: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    restarts: int = 0
    why: str = ""
    log: str = ""


def status_of(run: Path) -> list[Status]:
    """Return how the stages of a run are, in the order of the plan's file.

    Raises:
        UserError: The folder is no run's, or a file in it is damaged.
    """
    check_run(run)
    submission = read_submission(run)
    queue = _queue(run, submission) if submission else None
    with reading(run):
        names = list(_names(run, submission))
    found: dict[str, Status] = {}
    for name in dict.fromkeys([*(submission.jobs if submission else ()), *names]):  # jobs after those they wait for
        with reading(run / "stages" / name):
            found[name] = _status(run, name, submission, queue, found)
    return [found[name] for name in names]


def print_status(run: Path, watch: bool = False) -> None:
    """Show how a run is, on stdout; with ``watch`` until nothing of it runs, or will by itself, at two looks."""
    console = Console(width=None if sys.stdout.isatty() else 250)  # a file has no edge
    idle, shown = 0, None  # looks; between two stages of a `patchmill run` there is nothing for a moment
    while True:
        stages = status_of(run)
        idle = 0 if any(map(_lives, stages)) else idle + 1
        if idle < 2 or stages != shown:
            shown = stages
            if watch and console.is_terminal:
                console.clear()
            with reading(run):
                table = _table(run, stages)
            console.print(table)
        if not watch or idle == 2:
            return
        time.sleep(SECONDS)


def cancel_run(run: Path) -> list[str]:
    """End all jobs of a run, and wait until they are gone; return their names.

    Raises:
        UserError: It was never submitted.
        PatchmillError: Some do not end.
    """
    check_run(run)
    submission, deadline = read_submission(run), time.monotonic() + GONE
    cancelled: dict[str, Queued] = {}
    if submission is None:
        raise UserError(
            f"no job of {run} is known: it was never submitted; stop its `patchmill run` by Ctrl-C or SIGTERM"
        )
    if shutil.which("scancel") is None:
        raise UserError("there is no scancel on this machine; cancel from a login node")
    while left := states(submission):
        cancelled |= left
        if time.monotonic() > deadline:
            raise PatchmillError(f"{', '.join(left)} were cancelled, and do not end; does their node answer?")
        cancel({name: submission.jobs[name] for name in left})  # again: one may just have gone back into the queue
        time.sleep(1)
    return list(cancelled)


def newest_run(runs: Path) -> Path:
    """Return the run that was begun last.

    Raises:
        UserError: There is none.
    """
    found = sorted(runs.glob("*/plan.toml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"there is no run in {runs}; give one: --run RUNS/NAME")
    return found[-1].parent


def print_log(run: Path, stage: str, rank: int, lines: int, follow: bool) -> None:
    """Show the end of what a stage said, on stdout, and with ``follow`` what it says from now on, until it has ended.

    Raises:
        UserError: There is no such stage, or nothing was said where a file has it.
    """
    check_run(run)
    names = list(_names(run, read_submission(run)))
    if stage not in names:
        raise UserError(f"{run} has no stage {stage!r}; it has {', '.join(names)}")
    beside = run / "stages" / stage / "logs"
    log = log_of(run, stage)
    if rank or not log.exists() or noted(beside.parent):  # it was never a job, or `patchmill run` was at it since
        log = beside / f"rank-{rank}.log"
    if not log.exists():
        others = ", ".join(str(path) for path in sorted(beside.glob("*.log"))) or "nothing else is there"
        raise UserError(f"there is no {log} yet; {others}")
    print(f"==> {log}", file=sys.stderr)
    with open(log, encoding="utf-8", errors="replace") as file:
        sys.stdout.write("".join(file.readlines()[-lines:]))
        sys.stdout.flush()  # as below: into a pipe, too, at once
        heard = float("-inf")
        while follow:
            if time.monotonic() - heard >= SILENCE:  # who speaks lives, and looking may ask Slurm
                follow, heard = any(each.name == stage and _lives(each) for each in status_of(run)), time.monotonic()
            if new := file.read():
                heard = time.monotonic()
                sys.stdout.write(new)
                sys.stdout.flush()
            time.sleep(1)


def _queue(run: Path, submission: Submission) -> dict[str, Queued] | None:
    """Return what the queue has of a run's jobs; None: nobody knows."""
    if shutil.which("squeue") is None:
        return None
    try:
        queue = states(submission)
        if not (hidden := unseen(run, submission, queue)):
            return queue
        why = f"ranks of {', '.join(hidden)} are at work, although no queue here has their jobs"
    except PatchmillError as error:
        why = str(error)
    print(f"warning: {why}; this is what the run's folder says", file=sys.stderr)
    return None


def _names(run: Path, submission: Submission | None) -> Iterator[str]:
    jobs = list(submission.jobs) if submission else []
    sweeps: dict[str, Sweep] = {}
    for stage in read_toml(run / "plan.toml")["stage"]:
        name = stage["name"]
        if "sweep" not in stage:
            if not noted(run / "stages" / name):
                yield from _in_order({each for each in jobs if re.fullmatch(rf"{re.escape(name)}\.\d+", each)})
            yield name
            continue
        try:
            sweeps[name] = sweep_of(name, stage["sweep"], stage.get("recipe"), sweeps)
            members = set(sweeps[name].members)
        except UserError:  # its values are in a recipe beside the plan: those that have begun, then
            folders = [path.name for path in (run / "stages").glob(f"{name}-*")]
            members = {each for each in [*jobs, *folders] if re.fullmatch(rf"{re.escape(name)}-\d+", each)}
        yield from _in_order(members or {name})


def _in_order(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: int((re.search(r"\d+$", name) or [0])[0]))


def _status(
    run: Path, name: str, submission: Submission | None, queue: dict[str, Queued] | None, before: dict[str, Status]
) -> Status:
    folder, record = run / "stages" / name, Record(run, name).table
    job = submission.jobs.get(name) if submission else None
    queued = (queue or {}).get(name)
    if job and not queued and _ran_since(run, job, record):
        job, record = None, {}
    why = record.get("reason") or ""
    if queued:
        state = WORDS.get(queued.state, queued.state.lower())
        if state == "running" and record.get("state") == "starting":
            state = "starting"
        if queued.reason == "Dependency" and job:
            why = f"after {', '.join(need for need in job.needs if before[need].state != 'done')}"
        elif queued.state == "PENDING" and queued.reason != "None":
            why = ", ".join(filter(None, (why, f"waits: {queued.reason}")))
    elif job is None:
        state, why = _here(folder)
    elif record.get("state") == "failed":
        state = "failed"
    elif record.get("state") == "done" or (job.digest and result_of(folder, job.digest)):
        state, why = "done", ""
    elif record.get("state") and queue is None:
        state = record["state"]
    elif record.get("state") == "starting":
        state = "failed"
    elif record.get("state") == "running":
        state, why = "lost", "its job is gone without a word: killed, or its node was"
    else:
        ended = [before[need] for need in job.needs if before[need].state in DEAD]
        state = "cancelled" if ended or queue is not None else "waiting"
        why = why or ", ".join(f"{need.name} {need.state}" for need in ended)
    log = (
        log_of(run, name) if job else next(filter(Path.exists, (folder / "logs" / "rank-0.log", folder / "logs")), None)
    )
    return Status(
        name, state, job.id if job else None, **_progress(folder, state == "running"),
        restarts=max(0, record.get("tries", 0) - 1), why=why, log=os.path.relpath(log) if log and log.exists() else "",
    )  # fmt: skip


def _ran_since(run: Path, job: Job, record: dict[str, Any]) -> bool:
    """Tell whether a ``patchmill run`` was at the stage of a job since it was submitted, or set aside what it made."""
    folder = run / "stages" / job.stage
    return bool(noted(folder)) or (record.get("state") == "done" and not folder.exists())


def _here(folder: Path) -> tuple[str, str]:
    """Return how a stage is that is no job's, and why: as ``patchmill run`` notes it."""
    if result_of(folder):
        return "done", ""
    told = noted(folder)
    state, why = told.get("state", "begun" if folder.exists() else "not begun"), told.get("reason", "")
    if state == "running" and not is_held(folder / "logs" / RUNNER, unknown=True):
        return "lost", "its process is gone without a word: killed, or its machine was"
    return state, why


def _progress(folder: Path, running: bool) -> dict[str, Any]:
    """Return how far a training stage is."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "step" in line]  # others are of held-out images
    settings = folder / "resolved.toml"
    if not lines or not settings.exists():
        return {}
    line, table = lines[-1], read_toml(settings)
    epoch = round(line["samples"] / line["epoch"]) if line.get("epoch") else None
    try:
        total = Duration(table["duration"]).samples(epoch, table["global_batch"])
    except UserError:  # in epochs of what has none, before it has a line
        return {"step": line["step"]}
    speed = line["images_per_second"]
    return {
        "step": line["step"], "share": min(1.0, line["samples"] / max(total, 1)), "images_per_second": speed,
        "seconds_left": max(0.0, total - line["samples"]) / speed if speed and running else None,
    }  # fmt: skip


def _lives(stage: Status) -> bool:
    """Tell whether a stage goes on by itself: it is run from here, or its job is in the queue, or comes back."""
    return stage.state == "running" or (stage.job is not None and stage.state not in ("done", *DEAD))


def _table(run: Path, stages: list[Status]) -> Table:
    table = Table(title=escape(str(run)), title_justify="left", box=None, pad_edge=False)
    for heading in ("stage", "state", "job", "step", "", "images/s", "left", "restarts", "", "log"):
        table.add_column(heading, justify="right" if heading in ("step", "images/s", "left", "restarts") else "left")
    for stage in stages:
        left = datetime.timedelta(seconds=round(stage.seconds_left)) if stage.seconds_left is not None else ""
        table.add_row(
            stage.name, f"[{COLOURS.get(stage.state, 'default')}]{stage.state}[/]", stage.job or "",
            f"{stage.step:,}" if stage.step is not None else "",
            f"{100 * stage.share:.0f}%" if stage.share is not None else "",
            f"{stage.images_per_second:,.0f}" if stage.images_per_second else "", str(left),
            str(stage.restarts) if stage.restarts else "", escape(stage.why), escape(stage.log),
        )  # fmt: skip
    return table
