"""The nodes of this job: those that fail their health check, and what Slurm says of doing without some."""

import os
import signal
import subprocess
import time
from pathlib import Path

from launch.slurm import AWAY, persist, sbatch, slurm
from launch.submission import folder_of
from shards.errors import PatchmillError, StoppedOnRequestError

CHECK = 120.0  # seconds for the health check of all nodes
NEVER = "node configuration is not available"  # what Slurm says of a job for which it has not the nodes, busy or not
SURE = 20.0  # seconds; for some after its start the controller says it of nodes that it has not heard of yet


def job_number() -> str:
    """Return the number of this job, or task of an array, as Slurm's commands take it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def excluded(job: str) -> list[str]:
    """Return the nodes that a job is not to run on, as Slurm writes them: ``n[1-2]``."""
    return slurm("squeue", "--noheader", f"--jobs={job}", "--format=%x").split()


def sick_nodes(health: list[str]) -> list[str] | None:
    """Return the nodes on which a command fails, or does not end; of no command none. None: srun began it nowhere.

    Raises:
        StoppedOnRequestError: It was ended from outside, and nobody knows.
    """
    if not health:
        return []
    nodes = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    # The shell tells who began, and who passed, so that a node that says no more did not; `$@` is the command, and no
    # shell reads it.
    told = ["sh", "-c", 'echo "$SLURMD_NODENAME"; "$@" >&2 && echo "$SLURMD_NODENAME"', "health", *health]
    command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--no-kill", *told]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=CHECK)
        said = done.stdout.split()
        if done.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            raise StoppedOnRequestError("stopped on request while the health of its nodes was checked")
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode().split()
    return [node for node in nodes if said.count(node) < 2] if said else None


def refusal(nodes: list[str], run: Path) -> str:
    """Return what Slurm says against this job of a run without some nodes, and without those that it is not to have.

    Nothing: it could start. ``NEVER`` in it: it never could. Else nobody knows: who submits from a node of the job's,
    or one job more, may not be welcome just now.
    """
    script = folder_of(run) / f"{os.environ['SLURM_JOB_NAME'].rpartition(':')[2]}.sbatch"
    told = _against(script, nodes)
    if NEVER in told:
        time.sleep(SURE)
        told = _against(script, nodes)
    return told


def _against(script: Path, nodes: list[str]) -> str:
    def ask() -> None:
        sbatch(script, "--test-only", f"--exclude={','.join([*excluded(job_number()), *nodes])}")

    try:
        persist(ask, AWAY)
    except PatchmillError as error:
        return str(error)
    return ""
