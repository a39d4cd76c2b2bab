"""One rank of a command, whoever started it: their variables say which, and the rest of the code knows torchrun's.

    srun     python -m launch.rank LOGS train CONFIG ...
    mpirun   python -m launch.rank --meet HOST:PORT LOGS train CONFIG ...
    torchrun --module  launch.rank LOGS train CONFIG ...

As on one machine (``launch.local``), rank 0 speaks on stderr and leaves its stdout in ``LOGS/stdout.log``, and the
others write ``LOGS/rank-N.log``. Launchers lose exit codes, or tell of the last rank to end: that of a rank that knows
why it ends is in ``LOGS/ended``. Whoever makes a file ``LOGS/stop`` asks all ranks to save and end, on any node.
"""

import argparse
import ctypes
import fcntl
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from shards.atomic import hold, is_held
from shards.errors import TOLD

ENDED = "ended"
STOP = "stop"
DRIVER = "driver"  # in LOGS: locked by the patchmill run that started the ranks' launcher, as long as it lives
SECONDS = 1.0  # between two looks
PR_SET_PDEATHSIG = 1
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # that the rest of the code goes by


class Who(NamedTuple):
    """Which rank of how many this process is; ``local`` of those ``here``, on its node."""

    rank: int
    ranks: int
    local: int
    here: int


def who(environment: Mapping[str, str]) -> Who:
    """Return which rank a process with these variables is; nobody's is alone.

    What is started inside something else comes first: torchrun in a job of Slurm, say.
    """
    sources = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environment else "LOCAL_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    )
    if "SLURM_STEP_TASKS_PER_NODE" in environment:  # which every srun sets, as 3(x2),2
        each = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
        nodes = [tasks for tasks, times in each for _ in range(int(times or 1))]
        environment = {**environment, "SLURM_NTASKS_PER_NODE": nodes[int(environment.get("SLURM_NODEID", 0))]}
    for rank, ranks, local, here in sources:
        if rank in environment:
            numbers = (environment[rank], environment[ranks], environment[local], environment.get(here, "1"))
            return Who(*map(int, numbers))
    return Who(0, 1, 0, 1)


def threads(environment: Mapping[str, str], bound: int, here: int) -> int:
    """Return how many threads a rank may have, so that those of its node share its cores.

    Args:
        environment: Of the process.
        bound: Cores that it may run on.
        here: Ranks on its node.
    """
    if "SLURM_CPUS_ON_NODE" not in environment or {"RANK", "OMPI_COMM_WORLD_RANK"} & environment.keys():
        return max(1, bound // here)  # what another launcher started shares the cores of that
    # srun may have bound its tasks each to its own cores, or none of them to any.
    share = int(environment.get("SLURM_CPUS_PER_TASK", int(environment["SLURM_CPUS_ON_NODE"]) // here))
    return max(1, min(bound, share))


def plain(word: str) -> str:
    """Return a word in which no shell finds anything to do: what is not plain as ``=`` and its byte, in hex."""
    return re.sub(rb"[^A-Za-z0-9_./,:@+-]", lambda found: b"=%02X" % found[0][0], word.encode()).decode()


def original(word: str) -> str:
    """Return what ``plain`` was given."""
    return re.sub(rb"=([0-9A-F]{2})", lambda found: bytes.fromhex(found[1].decode()), word.encode()).decode()


def die_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is killed: SIGTERM saves and stops."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run a command as this rank."""
    asked = _arguments(sys.argv[1:])
    logs, sys.argv = Path(asked.logs), [sys.argv[0], *asked.command]
    if asked.folder:
        os.chdir(asked.folder)
    if asked.meet:
        os.environ["MASTER_ADDR"], _, os.environ["MASTER_PORT"] = asked.meet.rpartition(":")
    if "RANK" in os.environ:  # torchrun and the like leave their ranks behind when they are killed
        die_with_parent()
    rank, ranks, local, here = who(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads(os.environ, len(os.sched_getaffinity(0)), here)))
    if ranks > 1:
        os.environ |= dict(zip(NAMES, map(str, (rank, ranks, local)), strict=True))
    _speak_into(logs, rank, asked.quiet)

    from launch.cli import run_command
    from shards.ending import end_process

    code = run_command()
    if code and (code in TOLD or not (logs / ENDED).exists()):
        with suppress(OSError):  # its disk may be full, which may be why it ends
            (logs / ENDED).write_text(str(code))
    end_process(code)


def code_of_ranks(logs: Path) -> int | None:
    """Return the exit code of a rank that knew why it ends; None: there is none, or its disk was full."""
    told = (logs / ENDED).read_text() if (logs / ENDED).exists() else ""
    return int(told) if told else None


def _arguments(words: list[str]) -> argparse.Namespace:
    if words[:1] == ["--plain"]:  # for launchers that go through a shell, and quote nothing
        words = [original(word) for word in words[1:]]
    parser = argparse.ArgumentParser("python -m launch.rank", usage="%(prog)s [--quiet] [--meet HOST:PORT] LOGS ...")
    parser.add_argument("--quiet", action="store_true", help="rank 0, too, writes a log and not on stderr")
    parser.add_argument("--meet", help="where the ranks meet, if their launcher does not tell: HOST:PORT, of rank 0")
    parser.add_argument("--folder", help="to work in")
    parser.add_argument("logs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser.parse_args(words)


def _speak_into(logs: Path, rank: int, quiet: bool) -> None:
    hold(logs, fcntl.LOCK_SH)  # until this process ends: so the launcher sees it has
    if rank or quiet:
        written = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(written, 1)
        os.dup2(written, 2)
    if rank == 0:
        os.dup2(os.open(logs / "stdout.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        threading.Thread(target=_await_stop, args=[logs], daemon=True).start()


def _await_stop(logs: Path) -> None:
    driven = is_held(logs / DRIVER, unknown=False)  # by somebody who started this, and would be told how it ends
    while not (logs / STOP).exists() and is_held(logs / DRIVER, unknown=driven) == driven:
        time.sleep(SECONDS)
    (logs / STOP).unlink(missing_ok=True)  # or who goes on by hand would stop at once
    os.kill(os.getpid(), signal.SIGUSR1)  # one rank is enough: they agree on a step


if __name__ == "__main__":
    main()
