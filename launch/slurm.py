"""A plan as Slurm jobs: a readable sbatch script for each stage, chained, in the run's folder."""

import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from launch.choice import is_done
from launch.cluster import Cluster, JobSettings, layout
from launch.plan import Plan, Stage
from launch.run import begin, check_unused, forget, noted, set_aside_what_sweeps_lost
from launch.snapshot import take_snapshot
from launch.stages import KINDS
from launch.submission import Job, Record, Submission, folder_of, keep_plan, logs_of, read_submission
from shards.atomic import is_held, only_one, write_text
from shards.errors import PatchmillError, UserError
from shards.signals import SIGNALS

CODE = "code"  # the snapshot, in the folder of scripts
OTHERWISE = {"mem": "MEM_PER_NODE", "requeue": "NO_REQUEUE", "switches": "REQ_SWITCH", "time": "TIMELIMIT"}
"""Variables of sbatch, less SBATCH_, that are not called as their options are."""
SHORT = {"A": "account", "C": "constraint", "G": "gpus", "p": "partition", "q": "qos", "t": "time"}
OWN = ("SLURM_", "SQUEUE_", "SCANCEL_", "SCONTROL_")  # variables that change what its commands do
AWAY = 600.0  # seconds that the controller may be away
PASSES = ("unable to contact", "connect", "timed out", "does not run", "try again")  # in the words of such an error


@dataclass(frozen=True)
class Part:
    """What one sbatch script runs: a stage, the runs of a sweep, the slices of a build, or what ends those.

    Attributes:
        name: Of script and job.
        stages: One, or of a sweep those to be run, by their place in it.
        late: A sweep that is still to run settles what it does.
        needs: Names of jobs that must have ended well.
        slices: Of a build; 1: it is not cut.
        merge: It ends a build in slices.
    """

    name: str
    stages: dict[int, Stage]
    late: bool
    needs: tuple[str, ...]
    slices: int = 1
    merge: bool = False

    @property
    def stage(self) -> Stage:
        """The first of its stages; what is asked of Slurm for them is the same."""
        return next(iter(self.stages.values()))

    @property
    def title(self) -> str:
        """What it is, in words."""
        if self.slices > 1 or self.merge:
            return f"Stage {self.stage.table.name}, {'the end of its slices' if self.merge else 'in slices'},"
        return f"Stage {self.stage.sweep.name}, a sweep," if self.stage.sweep else f"Stage {self.name}"

    @property
    def array(self) -> str | None:
        """The tasks of the array, if it is one."""
        if self.slices > 1:
            return f"0-{self.slices - 1}"
        return ",".join(map(str, self.stages)) if self.stage.sweep else None

    @property
    def log(self) -> str:
        """The name of its log, as sbatch fills it in."""
        return self.job.replace("$SLURM_ARRAY_TASK_ID", "%a")

    @property
    def job(self) -> str:
        """The name of the job that runs, as the shell fills it in."""
        if self.slices > 1:
            return f"{self.stage.table.name}.$SLURM_ARRAY_TASK_ID"
        return f"{self.stage.sweep.name}-$SLURM_ARRAY_TASK_ID" if self.stage.sweep else self.stage.table.name

    def jobs(self, number: str, settings: JobSettings) -> dict[str, Job]:
        """Return its jobs by name, given the number that Slurm gave it."""
        name, shared = self.stage.table.name, {"needs": self.needs, "settings": settings}
        if self.slices > 1:
            return {
                f"{name}.{each}": Job(id=f"{number}_{each}", stage=name, slice=f"{each}/{self.slices}", **shared)
                for each in range(self.slices)
            }
        shared |= {"slice": "merge"} if self.merge else {}
        return {
            stage.table.name: Job(
                id=f"{number}_{place}" if stage.sweep else number,
                stage=stage.table.name,
                digest=None if self.late else stage.digest,
                **shared,
            )
            for place, stage in self.stages.items()
        }


def submit(plan: Plan, cluster: Cluster) -> dict[str, Job]:
    """Submit every stage that is not finished; if one cannot be, none is. Return the jobs by name.

    Raises:
        UserError: Jobs of this run are in the queue, a ``patchmill run`` is at it, Slurm is not here, or it does not
            take a script.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on this machine; submit from a login node, or use `patchmill run` here")
    cluster.check_names(list(KINDS), [stage.name for stage in plan.table.stage])
    folder = folder_of(plan.run)
    with only_one(folder, "submit", wait=60):
        check_idle(plan.run)
        check_unused(sorted((plan.run / "stages").glob("*")))
        parts = [(part, _settings(part, cluster)) for part in _parts(plan, cluster)]
        scripts = [_script(plan, part, settings) for part, settings in parts]  # all that may be wrong is wrong by now
        set_aside_what_sweeps_lost(plan)
        write_text(plan.run / "plan.toml", plan.path.read_text(encoding="utf-8"))
        if not parts:
            return {}
        recipes = keep_plan(plan)
        take_snapshot(folder / CODE)
        table = {"plan": str(plan.path), "name": plan.run.name, "smoke": plan.smoke, "known": plan.inputs.known}
        table |= {"recipes": recipes, "uid": os.getuid()}
        jobs: dict[str, Job] = {}
        try:
            for (part, settings), text in zip(parts, scripts, strict=True):
                if part.slices > 1:
                    begin(part.stage)  # not each slice for itself
                script = folder / f"{part.name}.sbatch"
                write_text(script, text)
                with _nothing_heard():  # a job whose number is not known could not be cancelled
                    jobs |= part.jobs(_sbatch(script, part.needs, jobs), settings)
                Submission(**table, jobs=jobs).write(plan.run)
            Submission(**table, cluster=_configuration()["ClusterName"], jobs=jobs).write(plan.run)
            for name, job in jobs.items():
                Record(plan.run, name).forget()  # of a job before
                forget(plan.run / "stages" / job.stage)  # of a `patchmill run` before
            # Held until now: a job that starts finds itself in what was written, and one of half a plan never starts.
            slurm("scontrol", "release", ",".join(_numbers(jobs)))
        except BaseException as error:  # Ctrl-C, too, leaves none of them held in the queue
            with _nothing_heard():  # whoever presses it twice does not want them held, either
                cancel(jobs)
            if not isinstance(error, PatchmillError | OSError):
                raise
            raise UserError(f"{error}; nothing was submitted, and the scripts are in {folder}") from None
    return jobs


@dataclass(frozen=True)
class Queued:
    """A job in the queue, in ``squeue``'s words."""

    state: str
    reason: str


def states(submission: Submission) -> dict[str, Queued]:
    """Return those jobs of a run that are in the queue, by name.

    Numbers alone do not tell: a cluster that was set up anew counts from 1 again, and another has its own.

    Raises:
        UserError: They are in a queue that cannot be seen from here.
        PatchmillError: Slurm gives no answer.
    """
    jobs = submission.jobs
    if not jobs:
        return {}
    here = _configuration()
    if submission.cluster not in (None, here["ClusterName"]):
        raise UserError(
            f"the jobs of {submission.name} were submitted to cluster {submission.cluster}, and this is "
            f"{here['ClusterName']}; ask there, or, when they have ended, remove slurm/submission.json of the run"
        )
    numbers = ",".join(dict.fromkeys(job.id.partition("_")[0] for job in jobs.values()))
    # Of one number that it has forgotten squeue says that it is invalid, and of several nothing.
    try:
        told = slurm("squeue", "--noheader", "--array", f"--jobs={numbers}", "--format=%i|%T|%r|%j")
    except PatchmillError as error:
        if "Invalid job id" not in str(error):
            raise
        told = ""
    lines = (line.split("|", 3) for line in told.splitlines())
    ours = f"{submission.name}:"
    found = {number: Queued(state, reason) for number, state, reason, name in lines if name.startswith(ours)}
    others = submission.uid is not None and os.getuid() not in (submission.uid, 0)
    if others and not found and "jobs" in here["PrivateData"]:
        raise UserError(
            f"another user submitted the jobs of {submission.name}, and this cluster shows nobody the jobs of others "
            "(PrivateData); let that user ask, or, when they have ended, remove slurm/submission.json of the run"
        )
    return {name: found[job.id] for name, job in jobs.items() if job.id in found}


def unseen(run: Path, submission: Submission, queue: Container[str]) -> list[str]:
    """Return the jobs of a run whose ranks are at work although its queue, as of ``states``, has none of them."""
    return [
        name
        for name, job in submission.jobs.items()
        if name not in queue
        and Record(run, name).table.get("state") != "done"
        and _at_work(logs_of(run, job))
        and not noted(run / "stages" / job.stage)  # else they are of a `patchmill run`
    ]


def _at_work(logs: Path) -> bool:
    """Tell whether ranks that write to this folder live; who looks has it for a moment, and is not taken for them."""
    for pause in (0.05, 0.1, 0.2, 0.0):
        if not is_held(logs, unknown=False, shared=True):
            return False
        time.sleep(random.uniform(0, 2) * pause)  # two that look do not keep step
    return True


def check_idle(run: Path) -> None:
    """Check that no job of a run is in the queue, or at work.

    Raises:
        UserError: One is, or nobody can tell.
        PatchmillError: Slurm gives no answer.
    """
    submission = read_submission(run)
    if submission is None:
        return
    how = f"patchmill cancel {shlex.quote(str(run))}"
    if shutil.which("squeue") and (left := states(submission)):
        raise UserError(f"jobs of {run} are in the queue ({', '.join(left)}); wait for them, or end them: {how}")
    if hidden := unseen(run, submission, ()):
        nodes = ", ".join(f"{name} on {Record(run, name).table.get('nodes') or 'another node'}" for name in hidden)
        remedy = f"wait for them, or end them: {how} where they were submitted, or kill them there"
        raise UserError(f"ranks of {run} are at work ({nodes}), although no queue here has their jobs; {remedy}")


def cancel(jobs: dict[str, Job]) -> None:
    """End jobs, those that wait too.

    Raises:
        PatchmillError: Slurm gives no answer.
    """
    if jobs:
        slurm("scancel", *(job.id for job in jobs.values()))


def _parts(plan: Plan, cluster: Cluster) -> Iterator[Part]:
    to_run: dict[str, bool] = {}  # names of jobs to wait for, and whether a sweep is to settle their digest
    names: set[str] = set()

    def part_of(name: str, stage: Stage) -> str:
        return stage.sweep.name if stage.sweep else name

    for name, group in itertools.groupby(plan.stages, lambda stage: part_of(stage.table.name, stage)):
        stages = [stage for stage in group if not is_done(stage) or any(need in to_run for need in stage.needs)]
        if not stages:
            continue
        needs = tuple(dict.fromkeys(need for stage in stages for need in stage.needs if need in to_run))
        late = any(to_run[need] for need in needs)
        first = stages[0]
        to_run |= {stage.table.name: late or stage.sweep is not None for stage in stages}
        slices = cluster.job(first.table.kind, name).slices if first.table.kind == "shards" else 1
        if slices > 1:
            yield Part(f"{name}.slices", {0: first}, late, needs, slices)
            yield Part(name, {0: first}, late, tuple(f"{name}.{each}" for each in range(slices)), merge=True)
            continue
        unique = name if name not in names else first.table.name  # what a sweep's runs wait for may cut it in two
        names.add(name)
        yield Part(unique, {_place(stage): stage for stage in stages}, late, needs)


def _place(stage: Stage) -> int:
    return stage.sweep.members.index(stage.table.name) if stage.sweep else 0


def _settings(part: Part, cluster: Cluster) -> JobSettings:
    stage = part.stage
    return cluster.job(stage.table.kind, stage.sweep.name if stage.sweep else stage.table.name)


def _script(plan: Plan, part: Part, settings: JobSettings) -> str:
    """Return the text of a script; whatever comes from settings is quoted, for sbatch and for the shell."""
    folder, stage = folder_of(plan.run), part.stage
    nodes, each = layout(stage.table.ranks, settings, stage.table.name)
    if "\\" in str(folder) or not str(folder).isprintable():  # after a backslash Slurm takes each % for itself
        raise UserError(f"Slurm writes no logs below {str(folder)!r}, for a character in it; choose another --runs")
    if ":" in str(folder):
        raise UserError(f"jobs cannot run the code below {str(folder)!r}, for its colon; choose another --runs")
    log = f"{str(folder).replace('%', '%%')}/{part.log}.log"
    options = {
        "job-name": f"{plan.run.name}:{part.name}", "output": log, "open-mode": "append",
        "array": part.array, "nodes": nodes, "ntasks-per-node": each, "cpus-per-task": settings.cpus_per_rank,
        "gpus-per-node": min(settings.gpus_per_node, each) or None, "mem": _memory(settings, each),
        "time": settings.time, "signal": f"B:USR2@{settings.grace}", "partition": settings.partition,
        "account": settings.account, "qos": settings.qos, "constraint": settings.constraint,
    }  # fmt: skip
    lines = ["#!/bin/bash -l" if settings.modules else "#!/bin/bash"]
    lines += [f"# {part.title} of {_comment(plan.path)}, written by `patchmill submit`."]
    lines += [f"#SBATCH --{name}={_option(str(value))}" for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in settings.sbatch), ""]
    mark = f"{shlex.quote(str(folder))}/{part.job}"
    told = f"${{SLURM_RESTART_COUNT:-0}} $(stat -c %s {mark}.log 2>/dev/null)"
    lines += [f'echo "{told}" >{mark}.begun  # until launch.job removes it']
    lines += ["trap '' USR2  # which warns of the time limit, until launch.job listens"]
    lines += ["export SLURM_EXPORT_ENV=ALL  # or, where sbatch was told --export, ranks lack what is set from here on"]
    lines += [_load(module) for module in settings.modules]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in settings.env.items()]
    lines += settings.setup
    lines += [f"cd {shlex.quote(os.getcwd())} || exit"]
    lines += [f"export PYTHONPATH={shlex.quote(str(folder / CODE))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    # -P: not the code that happens to be where it was submitted.
    lines += [f"exec {shlex.quote(sys.executable)} -P -m launch.job {shlex.quote(str(plan.run))} {part.job}"]
    return "\n".join(lines) + "\n"


def _memory(settings: JobSettings, each: int) -> str | None:
    """Return what a job of ``each`` ranks a node asks of a node's memory: as large a part as of its ranks, if known."""
    found = re.fullmatch(r"([1-9]\d*)([KMGT]?)", settings.memory or "", re.IGNORECASE)
    whole = settings.ranks_per_node or settings.gpus_per_node
    if not found or not whole:
        return settings.memory  # of a node, as 0 is, or for sbatch to judge
    part, unit = int(found[1]) * each, "KMGT".index(found[2].upper() or "M")
    while part % whole and unit:
        part, unit = part * 1024, unit - 1
    return f"{part // whole}{'KMGT'[unit]}"


def _load(module: str) -> str:
    told = shlex.quote(f"error: module load {module} failed")
    return f"module load {shlex.quote(module)} || {{ echo {told} >&2; exit {UserError.exit_code}; }}"


def _option(value: str) -> str:
    """Quote a value for an ``#SBATCH`` line: sbatch knows quotes, and a backslash before any character."""
    return value if re.fullmatch(r"[\w@%+=:,./&|*()\[\]-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _comment(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)


@contextmanager
def _nothing_heard() -> Iterator[None]:
    """Put off what ends a command, in its main thread; programs started meanwhile do so, too."""
    heard: list[int] = []
    # The mask is this thread's and those programs': what it holds off, another thread may take for the whole process.
    handlers = {each: signal.signal(each, lambda number, _: heard.append(number)) for each in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for number in heard:
            signal.raise_signal(number)


def _sbatch(script: Path, needs: tuple[str, ...], jobs: dict[str, Job]) -> str:
    """Submit a script, held; return the number of its job."""
    options = ["--parsable", "--hold", "--kill-on-invalid-dep=yes"]
    if needs:
        options.append(f"--dependency=afterok:{':'.join(_numbers(jobs, needs))}")
    return sbatch(script, *options).strip().partition(";")[0]


def _numbers(jobs: dict[str, Job], names: Iterable[str] | None = None) -> list[str]:
    """Return the numbers of some jobs, or of all; of an array its own, where all of its tasks are among them."""
    some = {jobs[name].id for name in names or jobs}
    array = {number: number.partition("_")[0] for number in some}
    parted = {each.id.partition("_")[0] for each in jobs.values() if each.id not in some}
    return sorted({number if array[number] in parted else array[number] for number in some})


def sbatch(script: Path, *options: str) -> str:
    """Run sbatch with a script that goes by its own lines, whatever variables it is run with; as of ``slurm``."""
    return slurm("sbatch", *options, str(script), without=overruling(script.read_text(encoding="utf-8")))


def overruling(script: str) -> set[str]:
    """Return the variables that sbatch would put before what a script says, or that are not for its user to say."""
    lines = " ".join(re.findall(r"^#SBATCH(.*)$", script, re.MULTILINE))
    said = re.findall(r"\s--([a-z-]+)", lines) + [SHORT.get(one, one) for one in re.findall(r"\s-([A-Za-z])", lines)]
    named = {f"SBATCH_{OTHERWISE.get(option, option.replace('-', '_').upper())}" for option in said}
    return named | {f"SBATCH_{name}" for name in ("ARRAY_INX", "CLUSTERS", "ERROR", "WAIT")}


@lru_cache
def _configuration() -> dict[str, str]:
    """Return what the controller says of its cluster."""
    return dict(re.findall(r"^(\w+) *= (.*)$", slurm("scontrol", "show", "config"), re.MULTILINE))


def slurm(*command: str, without: Container[str] = ()) -> str:
    """Run a command of Slurm's, as from a shell outside of any job; ``without`` some variables.

    Of its own variables none counts either, but sbatch's: SQUEUE_STATES would hide jobs, SCANCEL_STATE spare some.

    Raises:
        PatchmillError: It fails.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in without and (not name.startswith(OWN) or name == "SLURM_CONF")
    }
    try:
        done = subprocess.run(command, env=inherited, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PatchmillError(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise PatchmillError(f"{command[0]} says: {reason}")
    return done.stdout


def passes(error: PatchmillError) -> bool:
    """Tell whether what Slurm says is passing trouble: the same may be asked again."""
    return any(words in str(error).lower() for words in PASSES)


def persist(ask: Callable[[], object], seconds: float) -> None:
    """Ask something of Slurm, again and again while that is in passing trouble, for so long.

    Raises:
        PatchmillError: As ``ask`` does at last.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            ask()
            return
        except PatchmillError as error:
            if not passes(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)
