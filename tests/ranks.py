"""Run a worker script on several real processes (gloo) and collect what each prints as JSON."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from launch.local import free_port
from tests.command import environment


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
    shared = environment(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [End(process.returncode, *output, process.pid) for process, output in zip(processes, outputs, strict=True)]
