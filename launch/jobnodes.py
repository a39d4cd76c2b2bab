"""The nodes of this job: those that fail their health check, and whether it could do without some."""

import os
import signal
import subprocess
from pathlib import Path

from launch.slurm import sbatch, slurm
from launch.submission import folder_of
from shards.errors import PatchmillError, StoppedOnRequestError

CHECK = 120.0  # seconds for the health check of all nodes


def job_number() -> str:
    """Return the number of this job, or task of an array, as Slurm's commands take it."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def excluded(job: str) -> list[str]:
    """Return the nodes that a job is not to run on, as Slurm writes them: ``n[1-2]``."""
    return slurm("squeue", "--noheader", f"--jobs={job}", "--format=%x").split()


def sick_nodes(health: list[str]) -> list[str]:
    """Return the nodes on which a command fails, or does not end; of no command none.

    Raises:
        StoppedOnRequestError: It was ended from outside, and nobody knows.
    """
    if not health:
        return []
    nodes = slurm("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    # The shell tells who passed, so that a node that says nothing did not; `$@` is the command, and no shell reads it.
    told = ["sh", "-c", '"$@" >&2 && echo "$SLURMD_NODENAME"', "health", *health]
    command = ["srun", f"--nodes={len(nodes)}", f"--ntasks={len(nodes)}", "--ntasks-per-node=1", "--no-kill", *told]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=CHECK)
        healthy = done.stdout
        if done.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            raise StoppedOnRequestError("stopped on request while the health of its nodes was checked")
    except subprocess.TimeoutExpired as late:
        healthy = (late.stdout or b"").decode()
    return [node for node in nodes if node not in healthy.split()]


def can_do_without(nodes: list[str], run: Path) -> bool:
    """Tell whether this job of a run could ever start without some nodes, and without those that it is not to have."""
    script = folder_of(run) / f"{os.environ['SLURM_JOB_NAME'].rpartition(':')[2]}.sbatch"
    try:
        sbatch(script, "--test-only", f"--exclude={','.join([*excluded(job_number()), *nodes])}")
    except PatchmillError:
        return False
    return True
