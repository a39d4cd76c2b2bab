"""A job that is to run again goes back into Slurm's queue."""

import datetime
import signal
import sys
import time
from functools import reduce
from math import inf

from launch.jobnodes import excluded, job_number
from launch.slurm import AWAY, passes, persist, slurm
from launch.submission import Record
from shards.errors import PatchmillError, StoppedOnRequestError

PAUSE = 5.0  # between two tries to reach it
ALTERED = 20.0  # seconds that Slurm may take until a job that goes back can be altered
KILLED = 90.0  # seconds that it may take to end it
SUPERSEDED = "a later try of this job goes on elsewhere; this one is over"


def requeue(record: Record, reason: str, exclude: list[str] | None = None) -> PatchmillError:
    """Put this job, or task of an array, back into the queue, unless Slurm is ending it.

    Args:
        record: Of the job.
        reason: Why it is to run again.
        exclude: Nodes that it is not to run on.

    Returns:
        What to raise; a StoppedOnRequestError if it comes back, or Slurm wants it to end.
    """
    job, state, deadline = job_number(), record.table["state"], time.monotonic() + AWAY
    while True:
        try:
            if (ending := _ending(record, job, reason)) is not None:
                return StoppedOnRequestError(ending)
            say(f"{reason}: back into the queue")
            before = excluded(job) if exclude else []
            # With SIGTERM Slurm ends this: not before all is said.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            record.note(state, reason=reason)  # before it: who goes back has not failed, whatever was noted meanwhile
            slurm("scontrol", "requeue", job)
            break
        except PatchmillError as error:
            told = f"{reason}, and it cannot go back into the queue: {error}; submit the plan again"
            if not passes(error) or time.monotonic() > deadline:
                return PatchmillError(told)
            record.note("failed", reason=told)  # in case that nothing more can be said
            say(f"{error}; tries again")
            time.sleep(PAUSE)
    if exclude:
        keep_off(job, [*before, *exclude])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    time.sleep(KILLED)
    return StoppedOnRequestError(reason)


def keep_off(job: str, nodes: list[str]) -> None:
    """Exclude nodes from a job in the queue; if that cannot be, say so: where it gets them again, that will show."""
    try:
        persist(lambda: slurm("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"), ALTERED)
    except PatchmillError as error:
        say(f"{', '.join(nodes)} cannot be excluded, and may be had again: {error}")


def is_over_time() -> bool:
    """Tell whether Slurm is ending this job because its time limit has come."""
    try:
        return slurm("squeue", "--noheader", f"--jobs={job_number()}", "--format=%r").strip() == "TimeLimit"
    except PatchmillError:
        return False


def time_left(at: float) -> float:
    """Return the seconds that this job had at a time (of ``time.time``) until its limit; 0 where nobody knows.

    By when it began: of one that is pre-empted Slurm says that it ends with its grace time.
    """
    try:
        told = slurm("squeue", "--noheader", f"--jobs={job_number()}", "--format=%S %l").split()
        return datetime.datetime.fromisoformat(told[0]).timestamp() + _seconds(told[1]) - at
    except (PatchmillError, ValueError, IndexError):
        return 0.0


def say(text: str) -> None:
    """Tell in the job's log."""
    print(f"[{time.strftime('%F %T')}] {text}", file=sys.stderr, flush=True)


def _ending(record: Record, job: str, reason: str) -> str | None:
    """Return why a job need not, or must not, be put back; None: it is to be."""
    state = slurm("squeue", "--noheader", f"--jobs={job}", "--format=%T %r").split()
    if record.is_superseded():
        return SUPERSEDED
    # What is ending for another reason than its time limit was cancelled, or is on its way back already.
    if state[:1] != ["RUNNING"] and state[1:] != ["TimeLimit"]:
        return f"{reason}; Slurm ends this job: {' '.join(state)}"
    return None


def _seconds(limit: str) -> float:
    """Return a time limit as Slurm writes it, ``1-12:30:00`` or ``30:00``, in seconds."""
    if limit == "UNLIMITED":
        return inf
    days, _, clock = limit.rpartition("-")
    return reduce(lambda sum, part: 60 * sum + int(part), clock.split(":"), 0) + 86400.0 * int(days or 0)
