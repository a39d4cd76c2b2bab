"""Ranks that die, hang or fail, on real processes: the others end, and know why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import free_port
from tests.command import environment

WORKER = Path(__file__).with_name("worker_liveness.py")


def run(how: str, who: int, ranks: int = 3) -> tuple[list[int], list[str], float]:
    """Return the exit codes and stderr of all ranks, and the seconds until all but ``who`` had ended."""
    shared = environment(WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), how, str(who)], stderr=subprocess.PIPE, text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    began = time.monotonic()
    try:
        told = {rank: each.communicate(timeout=60)[1] for rank, each in enumerate(processes) if rank != who}
        seconds = time.monotonic() - began
        if how == "stopped":
            os.kill(processes[who].pid, signal.SIGKILL)
        told[who] = processes[who].communicate(timeout=60)[1]
    finally:
        for process in processes:
            process.kill()
    return [each.returncode for each in processes], [told[rank] for rank in range(ranks)], seconds


def reasons(told: list[str]) -> list[str]:
    return [next(line for line in each.splitlines() if line.startswith("error: ")) for each in told]


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "who"),
    [
        ("alone", 1),
        pytest.param("killed", 1, marks=pytest.mark.slow),
        pytest.param("stopped", 2, marks=pytest.mark.slow),
    ],
)
def test_who_gives_no_sign_of_life_is_named_by_the_others(how, who):
    codes, told, seconds = run(how, who)
    others = [rank for rank in range(3) if rank != who]
    assert [codes[rank] for rank in others] == [1, 1]
    for reason in reasons([told[rank] for rank in others]):
        assert f"rank {who} on " in reason
        assert "died: no sign of life for " in reason
        assert reason.endswith("run again to go on")
    assert not any("Traceback" in told[rank] for rank in others)
    assert seconds < 30


@pytest.mark.slow
def test_without_rank_0_the_others_end_too():
    codes, told, _ = run("killed", 0)
    assert codes[1:] == [1, 1]
    assert all("rank 0 or its machine died" in reason for reason in reasons(told[1:]))


@pytest.mark.parametrize("how", ["error", pytest.param("bug", marks=pytest.mark.slow)])
def test_the_others_are_told_of_an_error_of_one_rank_alone(how):
    codes, told, _ = run(how, 1)
    assert codes == [1, 2 if how == "error" else 1, 1]
    said = "ended: the data is gone; bring it back" if how == "error" else "ended: 'x'"
    assert all("rank 1 on " in reason and said in reason for reason in reasons([told[0], told[2]]))


@pytest.mark.slow
def test_an_end_on_request_and_an_early_end_are_no_deaths():
    codes, told, _ = run("request", 1)
    assert codes == [75, 75, 75]
    assert reasons(told) == ["error: saved"] * 3
    codes, told, _ = run("early", 1)
    assert codes == [0, 0, 0]


@pytest.mark.long
def test_a_watchdog_alone_says_how_long_a_collective_may_take():
    codes, told, _ = run("late", 1, ranks=2)
    assert codes == [0, 0], told
