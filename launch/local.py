"""Ranks of one command on this machine: start them, watch them, end them together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.rank import die_with_parent
from launch.tail import Tail
from shards.errors import TOLD
from shards.signals import SIGNALS, leave_closed_terminal

GRACE = 20.0  # seconds that the other ranks get to end by themselves when one has failed


def run_ranks(arguments: list[str], ranks: int, logs: Path) -> tuple[int, str]:
    """Run ``patchmill ARGUMENTS`` on ``ranks`` processes and wait for all of them.

    Each writes ``logs/rank-N.log``, and what rank 0 says is on this process's stderr too, where it draws by
    itself if that is a terminal. If one fails the others are ended.

    Returns:
        The exit code (that of the first rank to fail, else 0) and rank 0's stdout.
    """
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen] = []
    with contextlib.ExitStack() as stack:
        stdout = stack.enter_context(open(logs / "stdout.log", "w+", encoding="utf-8"))
        environments = _environments(ranks)
        terminal = sys.stderr.isatty()
        tail = stack.enter_context(Tail(logs / "rank-0.log", loud=not terminal))
        for rank, environment in enumerate(environments):
            if rank == 0 and terminal:
                words, err = ["launch.tee", str(logs / "rank-0.log")], None
            else:  # a file and no pipe: who is killed leaves ranks behind that speak, and save
                err = stack.enter_context(open(logs / f"rank-{rank}.log", "a", encoding="utf-8"))
                words = ["launch.cli"]
            command = [sys.executable, "-m", *words, *arguments]
            out = err if rank else stdout
            processes.append(
                subprocess.Popen(command, env=environment, stdout=out, stderr=err, preexec_fn=die_with_parent)
            )
        previous = {number: signal.signal(number, _forward(processes)) for number in SIGNALS}
        try:
            code = _wait(processes, logs, tail)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            _end(processes, grace=0.0)
        stdout.seek(0)
        return code, stdout.read()


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environments(ranks: int) -> list[dict[str, str]]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    shared = {**os.environ}
    shared.setdefault("OMP_NUM_THREADS", threads)
    if ranks == 1:
        return [shared]
    shared |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _wait(processes: list[subprocess.Popen], logs: Path, tail: Tail) -> int:
    while True:
        tail.show()
        codes = [process.poll() for process in processes]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            _end(processes, GRACE)
            tail.show()
            rank, code = min(failed, key=lambda pair: pair[1] not in TOLD)
            if rank > 0:
                last = (logs / f"rank-{rank}.log").read_text(errors="replace").strip().splitlines()[-1:]
                print(f"rank {rank} ended with {_name(code)}: {' '.join(last)}", file=sys.stderr)
            elif code < 0:
                print(f"rank 0 ended with {_name(code)}", file=sys.stderr)
            return code if code > 0 else 1
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen], grace: float) -> None:
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


def _forward(processes: list[subprocess.Popen]) -> Callable[[int, object], None]:
    def handler(number: int, frame: object) -> None:
        leave_closed_terminal()
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGUSR1)  # for ranks a SIGTERM is no request to stop

    return handler


def _name(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
