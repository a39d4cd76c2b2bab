"""A stage inside its Slurm job: the batch script runs this on the first node, and this runs the ranks.

    python -m launch.job RUN NAME

When the ranks stopped because somebody asked them to (the time limit is near, a job of more weight needs the nodes,
``scancel --signal``), or crashed, exactly this job or task of an array goes back into the queue, and goes on from its
newest checkpoint when it runs again. Slurm itself does so where a node was lost.
"""  # fmt: skip

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from launch.choice import goes_on, is_done
from launch.cluster import layout
from launch.driver import await_ranks
from launch.findings import Finding, print_findings
from launch.jobnodes import NEVER, refusal, sick_nodes
from launch.lastwords import LastWords
from launch.local import free_port
from launch.plan import Stage
from launch.rank import ENDED, NAMES, STOP, code_of_ranks
from launch.requeue import SUPERSEDED, is_over_time, requeue, say, time_left
from launch.results import read_json
from launch.run import begin, finish
from launch.submission import Job, Record, folder_of, log_of, logs_of, read_submission
from pipeline.checkpoint import samples_of, whole_checkpoints
from pipeline.stop import STOPPED
from shards.errors import PatchmillError, StoppedOnRequestError, UserError
from shards.merge import count_written
from shards.plan import Slice

EARLY = "stopped on request before its ranks were started"
LOOK = 0.5  # seconds
AHEAD = 90.0  # seconds; Slurm may warn of the time limit a minute earlier than it is told, and clocks differ
LAST = 10.0  # seconds that ranks get after SIGTERM if the time is over; Slurm kills after 30, or as KillWait says


class Ranks:
    """The ranks of a try: started, told to stop, awaited."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._heeds = False
        self.asked: set[int] = set()
        self.warned: float | None = None  # when SIGUSR2 came: before the time limit, or, on some clusters, pre-emption
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, self._stop)

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """End what is done here, which may take long, with a StoppedOnRequestError if the job is asked to stop."""
        self._heeds = True
        try:
            if self.asked:
                raise StoppedOnRequestError(EARLY)
            yield
        finally:
            self._heeds = False

    def run(self, command: list[str], **environment: str) -> int:
        """Run srun to its end; return its exit code, which is of the last rank to be ended."""
        if self.asked:
            return 128 + signal.SIGTERM
        inherited = {name: value for name, value in os.environ.items() if name not in NAMES}  # srun's are the ranks'
        self._process = subprocess.Popen(command, env={**inherited, **environment}, stdin=subprocess.DEVNULL)
        if self.asked:  # while it was started
            self._process.send_signal(signal.SIGUSR2)
        while signal.SIGTERM not in self.asked:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(LOOK)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(LAST)
            if is_over_time():  # Slurm kills whoever is left soon, this too, and nobody would put the job back
                say("its time is over, and the ranks have not ended: what they did since the last checkpoint is lost")
                return 128 + signal.SIGTERM

    def _stop(self, number: int, frame: FrameType | None) -> None:
        # Nothing is saved here: the ranks agree on a step. srun hands USR2 on; of TERM it would kill them.
        self.asked.add(number)
        if number == signal.SIGUSR2 and self.warned is None:
            self.warned = time.time()
        if self._process and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)
        if self._heeds:
            self._heeds = False
            raise StoppedOnRequestError(EARLY)


class Progress:
    """How far a stage has come by now, which the next try starts from.

    Args:
        stage: One that builds shards counts those that are finished; one that trains, the samples of its newest
            checkpoint; the others start anew.
        slice: ``I/N``: of a build, these shards alone.

    Attributes:
        number: Of them.
    """

    def __init__(self, stage: Stage, slice: str | None):
        self._unit, self.number = "shards" if stage.table.kind == "shards" else "samples", 0
        if not goes_on(stage):
            return  # what is there is of other settings, and goes out of the way
        if stage.table.kind == "shards":
            own = Slice.parse(slice) if slice not in (None, "merge") else Slice()
            self.number = count_written(stage.folder / "data", own)
        else:
            saved = whole_checkpoints(stage.folder / "checkpoints")
            self.number = samples_of(saved[0]) if saved else 0

    def __str__(self) -> str:
        return f"{self.number:,} {self._unit}" if self.number else "the start"


def run_job(record: Record) -> None:
    """Run the job that a record is of.

    Raises:
        PatchmillError: It did not finish; by its kind it is the user's to mend, or goes on from the queue.
    """
    ranks, run, name = Ranks(), record.run, record.name
    submission = read_submission(run)
    if submission is None or name not in submission.jobs:
        raise UserError(f"{run} has no job {name}; submit its plan again")
    job = submission.jobs[name]
    stages = {stage.table.name: stage for stage in submission.read_plan(run).stages}
    stage = stages[job.stage]
    if job.digest not in (None, stage.digest):
        told = f"stage {job.stage} changed since it was submitted: tars that are streamed, or an edit meanwhile"
        raise UserError(f"{told}; submit it again")
    if is_done(stage):
        record.note("done", reason=None)
        return
    if lacking := [need for need in stage.needs if not is_done(stages[need])]:
        raise UserError(f"stage {job.stage} needs {', '.join(lacking)}, which did not finish; submit the plan again")
    at, before = Progress(stage, job.slice), record.table.get("nodes")
    last = read_json(record.path).get("reason")  # of the try before; by now the record is of this one
    say(f"{name}: try {record.table.get('tries', 0) + 1} on {os.environ['SLURM_JOB_NODELIST']}, from {at}")
    if record.begin(at.number) > job.settings.retries + 1:  # Slurm brought it back, each time a node was lost
        why = f"; the last: {last}" if last else ""
        raise PatchmillError(f"{job.settings.retries + 1} tries in a row came no further than {at}{why}")
    logs, words = logs_of(run, job), LastWords([log_of(run, name)])
    try:
        with ranks.heeding():
            for folder in (_doctors_logs(record), logs):
                _end_ranks_of_before(folder, before)
            sick = sick_nodes(job.settings.health)
    except StoppedOnRequestError as error:
        reason = str(error)
        if not _excused(record, job, ranks, reason, further=False):
            reason = "its time limit came before its ranks were started"
            record.note("stopped", reason=reason)
        raise requeue(record, reason) from None
    if sick is None:
        reason = f"crashed before the health of its nodes was checked: {words.error()}"
        record.note("crashed", reason=reason)
        raise requeue(record, reason)
    if sick:
        told, against = f"health check failed on {', '.join(sick)}", refusal(sick, run)
        if NEVER in against:
            remedy = "mend that or `health`, then submit again"
            raise PatchmillError(f"{told}, and the job cannot do without: {against}; {remedy}")
        told += f": excluded, although {against}" if against else ": excluded"
        record.note("stopped", reason=told)
        raise requeue(record, told, exclude=sick)
    if job.settings.doctor and (slow := _slow_nodes(record, job, stage, ranks)):
        told = f"slower than the others: {', '.join(slow)}"
        against = refusal(slow, run) if record.table["barren"] <= job.settings.retries else "excluded often enough"
        if not against:
            record.note("stopped", reason=f"{told}: excluded")
            raise requeue(record, f"{told}: excluded", exclude=slow)
        say(f"{told}; goes on with them, for want of others: {against}")
    if job.slice is None:
        begin(stage)
    began = time.monotonic()
    said = _step(record, job, stage, ranks, logs, _arguments(job, stage))
    if job.slice in (None, "merge"):
        finish(stage, said, time.monotonic() - began)
    record.note("done", reason=None)


def _doctors_logs(record: Record) -> Path:
    return folder_of(record.run) / f"{record.name}.doctor"


def _end_ranks_of_before(logs: Path, nodes: str | None) -> None:
    """Have the ranks of an earlier try save and end: on a node that Slurm lost they may live on, and train.

    Raises:
        PatchmillError: They do not.
    """
    if not logs.exists():
        return
    (logs / STOP).touch()
    try:
        await_ranks(logs)
    except UserError:
        told = f"ranks of an earlier try, on {nodes or 'another node'}, write to {logs.parent} and do not end; "
        raise PatchmillError(f"{told}kill them there, then submit the plan again") from None
    finally:
        (logs / STOP).unlink(missing_ok=True)


def _step(record: Record, job: Job, stage: Stage, ranks: Ranks, logs: Path, arguments: list[str]) -> str:
    """Run a command on all ranks; return rank 0's stdout.

    Raises:
        PatchmillError: It did not end well; as of ``run_job``.
    """
    for stale in (stage.folder / STOPPED, logs / ENDED, logs / STOP, logs / "stdout.log"):
        stale.unlink(missing_ok=True)
    words = LastWords(
        [log_of(record.run, record.name), *(logs / f"rank-{rank}.log" for rank in range(1, stage.table.ranks))]
    )
    code = ranks.run(_command(job, stage, logs, arguments), **_meeting(stage.table.ranks))
    if record.is_superseded():
        raise StoppedOnRequestError(SUPERSEDED)
    told = (logs / "stdout.log").read_text() if (logs / "stdout.log").exists() else ""
    if code == 0 and told:  # srun ends with 0, too, when it hears that a node was lost
        return told
    ended = code_of_ranks(logs) or code
    if ended == UserError.exit_code:
        raise UserError(f"{words.error()}; mend it, then submit the plan again")
    at = Progress(stage, job.slice)
    stopped = bool(ranks.asked) or (stage.folder / STOPPED).exists()
    stopped = stopped or ended == StoppedOnRequestError.exit_code or words.was_terminated()
    further = at.number > record.table["at"]
    reason = f"stopped on request at {at}" if stopped else f"crashed: {words.error()}"
    if stopped:
        if _excused(record, job, ranks, reason, further):
            raise requeue(record, reason)
        reason = f"its time limit came at {at}"
    record.note("stopped" if stopped else "crashed", reason=reason)
    if record.table["barren"] > job.settings.retries and not further:
        remedy = "; give it more `time`" if stopped else ""
        raise PatchmillError(f"{record.table['barren']} tries came no further than {at}; {reason}{remedy}")
    raise requeue(record, reason)


def _excused(record: Record, job: Job, ranks: Ranks, reason: str, further: bool) -> bool:
    """Note that a try was ended from outside, and tell whether that is so.

    It is not where its time limit came: one that is too short to come any further is no better than a crash.
    """
    barren = record.table["barren"]
    record.excuse("stopped", reason)  # now: Slurm's answer may take longer than is left
    warned = ranks.warned is not None and time_left(ranks.warned) <= job.settings.grace + AHEAD
    if not warned and (further or not is_over_time()):  # a warning is lost while the script loads modules
        return True
    record.note("stopped", barren=barren)
    return False


def _command(job: Job, stage: Stage, logs: Path, arguments: list[str]) -> list[str]:
    settings, ranks = job.settings, stage.table.ranks
    nodes, each = layout(ranks, settings, stage.table.name)
    command = ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={each}"]
    command += [f"--cpus-per-task={settings.cpus_per_rank}"] if settings.cpus_per_rank else []  # sbatch's is not enough
    command += [*settings.srun, *settings.container, settings.python or sys.executable, "-P", "-m", "launch.rank"]
    return [*command, str(logs), *arguments, "--json"]


def _arguments(job: Job, stage: Stage) -> list[str]:
    if job.slice == "merge":
        return ["shards", "merge", str(stage.folder / "data")]
    return [*stage.arguments, "--slice", job.slice] if job.slice else stage.arguments


def _meeting(ranks: int) -> dict[str, str]:
    """Return where the ranks meet: on this node, which has rank 0, at a port that is free now."""
    if ranks == 1:
        return {}
    return {"MASTER_ADDR": os.environ["SLURMD_NODENAME"], "MASTER_PORT": str(free_port())}


def _slow_nodes(record: Record, job: Job, stage: Stage, ranks: Ranks) -> list[str]:
    """Let the doctor look at a stage, on all its ranks, and tell in the job's log; return the nodes that are slow.

    Raises:
        PatchmillError: The stage will not run on these nodes; or as of ``run_job``.
    """
    logs, failed, command = _doctors_logs(record), None, ["doctor", str(record.run), "--only", stage.table.name]
    try:
        said = _step(record, job, stage, ranks, logs, command)
    except UserError as error:
        said, failed = (logs / "stdout.log").read_text() if (logs / "stdout.log").exists() else "", error
        if not said:  # it did not even begin
            raise
    findings = [Finding(**each) for each in json.loads((said.splitlines() or ["[]"])[-1])]
    print_findings(findings, file=sys.stderr)
    if failed:
        raise failed
    return list(dict.fromkeys(host for each in findings for host in each.hosts))


def main() -> int:
    """Run the job that the batch script names; its exit code is that of ``patchmill run``."""
    record = Record(Path(sys.argv[1]), sys.argv[2])
    try:
        run_job(record)
    except PatchmillError as error:
        record.note("stopped" if isinstance(error, StoppedOnRequestError) else "failed", reason=str(error))
        say(f"{record.name}: {error}")
        return error.exit_code
    except Exception as error:  # noqa: BLE001 (nobody else would tell)
        traceback.print_exc()
        reason = " ".join("".join(traceback.format_exception_only(error)).split())
        record.note("failed", reason=reason)
        return PatchmillError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
