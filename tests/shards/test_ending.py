"""How a process ends: at once, with its code, and with what it said."""

import subprocess
import sys

import pytest

from tests.command import environment

PROGRAM = """
import atexit, threading, time
from shards.ending import end_process
threading.Thread(target=time.sleep, args=[100]).start()  # the interpreter's own end would wait for it
atexit.register(print, "registered", end="")
print("said", end=" ")
end_process({code})
"""


def ended(code: int, stdout: object) -> subprocess.CompletedProcess:
    return run(PROGRAM.format(code=code), stdout)


def run(program: str, stdout: object) -> subprocess.CompletedProcess:
    command, env = [sys.executable, "-c", program], environment()
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=env, text=True, timeout=60)


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


def test_workers_that_nobody_told_to_end_are_not_waited_for():
    program = (
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from shards.ending import end_process\n"
        "pool = ProcessPoolExecutor(1)\n"
        "print(pool.submit(abs, -1).result())\n"
        "end_process(0)\n"
    )
    done = run(program, subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize(("command", "code"), [("--version", 0), ("shards verify nowhere", 2)])
def test_a_command_without_stdout_or_stderr_ends_with_its_code(command, code, closed, tmp_path):
    line = f"exec {sys.executable} -m launch.cli {command} {closed}"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == code, done.stderr
