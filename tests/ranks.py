"""Run a worker script on several real processes (gloo) and collect what each prints as JSON.

The processes are forked from one that has imported torch, DeepSpeed and Patchmill already: to import them takes longer
than what most workers do.
"""

import json
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from launch.local import free_port
from tests.command import environment

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.imports"])


def run_on_ranks(script: Path, ranks: int, *arguments: object, timeout: float = 120) -> list:
    """Start ``ranks`` processes of ``script ARGUMENTS``; return each rank's last stdout line, read as JSON."""
    ended = ends_of_ranks(script, ranks, *arguments, timeout=timeout)
    for rank, each in enumerate(ended):
        assert each.code == 0, f"rank {rank} ended with {each.code}:\n{each.stderr[-3000:]}"
    return [json.loads(each.stdout.strip().splitlines()[-1]) for each in ended]


class End(NamedTuple):
    """How a rank's process ended."""

    code: int
    stdout: str
    stderr: str
    pid: int


def ends_of_ranks(script: Path, ranks: int, *arguments: object, timeout: float = 120) -> list[End]:
    """Start ``ranks`` processes of ``script ARGUMENTS``; return how each ended."""
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()  # its imports need the path, and its threads are counted once and for all
    shared = environment(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory() as folder:
        logs = [(Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")) for rank in range(ranks)]
        command = [str(script), *map(str, arguments)]
        processes = [
            FORKS.Process(target=_run, args=(command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *both))
            for rank, both in enumerate(logs)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(deadline - time.monotonic())
            still = [rank for rank, process in enumerate(processes) if process.is_alive()]
            ends = [
                End(process.exitcode, *(log.read_text(errors="replace") for log in both), process.pid)
                for process, both in zip(processes, logs, strict=True)
            ]
            assert not still, f"ranks {still} did not end in {timeout} s:\n{ends[still[0]].stderr[-3000:]}"
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        return ends


def _run(arguments: list[str], env: dict[str, str], stdout: Path, stderr: Path) -> None:
    """Be a script's process, as if started from a shell."""
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method(None, force=True)  # what a new interpreter has
    for log, descriptor in ((stdout, 1), (stderr, 2)):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.path.insert(0, str(Path(arguments[0]).parent))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
