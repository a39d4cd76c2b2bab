"""How a process ends: at once, with its code, and with what it said."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, threading, time
from shards.ending import end_process
threading.Thread(target=time.sleep, args=[100]).start()  # the interpreter's own end would wait for it
atexit.register(print, "registered", end="")
print("said", end=" ")
end_process({code})
"""


def ended(code: int, stdout: object) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", PROGRAM.format(code=code)]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(program, stdout=stdout, stderr=subprocess.PIPE, env=env, text=True, timeout=60)


def test_a_process_ends_at_once_with_its_code_its_output_and_what_is_registered_at_exit():
    done = ended(75, subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (75, "said registered", "")


@pytest.mark.parametrize(("code", "ends"), [(0, 1), (75, 75)])
def test_output_that_cannot_be_written_is_told(code, ends):
    with open("/dev/full", "w") as full:
        done = ended(code, full)
    assert done.returncode == ends
    assert done.stderr == "error: what was to be written to stdout is lost: No space left on device\n"


def test_output_that_nobody_reads_any_more_is_no_complaint():
    with subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE) as gone:
        gone.wait()
        done = ended(0, gone.stdin)
    assert (done.returncode, done.stderr) == (1, "")
