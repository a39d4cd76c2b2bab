"""The command line in processes of its own, what they log, and the settings of a tiny training stage for them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


LAUNCH = """
import sys
from pathlib import Path
from launch.local import run_ranks
code, _ = run_ranks(sys.argv[3:], int(sys.argv[1]), Path(sys.argv[2]))
sys.exit(code)
"""  # arguments: ranks, folder of logs, a command


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a process of Patchmill, with ``more`` in it; its output is buffered, as a user's is."""
    mine = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**mine, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def patchmill(*arguments: object, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """Run a command; ``env`` is added to the environment."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment(**env),
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, code: int = 2) -> str:
    """Return the one line of an error, after checking that it is one."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


def done(process: subprocess.Popen) -> tuple[int, str]:
    """Wait for the end of a process; return its exit code and stderr."""
    try:
        _, stderr = process.communicate(timeout=180)
    finally:
        process.kill()
    return process.returncode, stderr


def losses(run: Path) -> list[tuple[int, float]]:
    """Return samples and loss of each line that a training run logged so far."""
    lines = []
    if (run / "metrics.jsonl").exists():
        for text in (run / "metrics.jsonl").read_text().splitlines():
            if text.endswith("}") and "loss" in (line := json.loads(text)):
                lines.append((line["samples"], line["loss"]))
    return lines


def wait_for_steps(run: Path, process: subprocess.Popen, steps: int, saves: int = 0) -> None:
    """Wait until a run has logged so many steps, and committed so many checkpoints."""
    deadline = time.monotonic() + 120
    while len(losses(run)) < steps or len(list(run.glob("checkpoints/*/checkpoint.json"))) < saves:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


TINY = """
[model]
name = "vit_ti8"
embed_dim = 24
num_heads = 3
depth = 1
[engine]
kind = "accelerate"
"""
TRAIN = (
    """
duration = "1 epoch"
global_batch = 12
[data]
train = "{train}"
val = "{val}"
resolution = 16
"""
    + TINY
)
