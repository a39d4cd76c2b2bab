"""How a rank's process ends, and the cores it has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

WORKER = Path(__file__).parent / "worker_cores.py"


def test_a_process_ends_at_once_with_its_code_its_output_and_what_is_registered_at_exit():
    program = (
        "import atexit, threading, time\n"
        "from pipeline import distributed\n"
        "distributed.start()\n"
        "threading.Thread(target=time.sleep, args=[100]).start()\n"  # the interpreter's own end would wait for it
        "atexit.register(print, 'registered', end='')\n"
        "print('said', end=' ')\n"
        "distributed.finish()\n"
        "distributed.end_process(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "said registered")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_that_may_use_all_cores_share_them(ranks):
    cores = len(os.sched_getaffinity(0))
    assert run_on_ranks(WORKER, ranks) == [max(1, cores // ranks)] * ranks


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="wants two cores")
def test_ranks_that_are_bound_have_the_cores_that_they_are_bound_to():
    """As Slurm binds tasks: dividing one's own cores by the ranks would leave most of them idle."""
    first, second, *others = sorted(os.sched_getaffinity(0))
    assert run_on_ranks(WORKER, 2, first, second) == [1, 1]
    both = ",".join(map(str, (first, second)))
    assert run_on_ranks(WORKER, 1, both) == [2]
    if len(others) > 1:
        assert run_on_ranks(WORKER, 2, both, ",".join(map(str, others[:2]))) == [2, 2]
