"""The command line in a process of its own, and the settings of a tiny training stage for it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def patchmill(*arguments: object, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess:
    """Run a command; ``env`` is added to the environment."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess, code: int = 2) -> str:
    """Return the one line of an error, after checking that it is one."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


TRAIN = """
duration = "1 epoch"
global_batch = 12
[data]
train = "{train}"
val = "{val}"
resolution = 16
[model]
name = "vit_ti8"
embed_dim = 24
num_heads = 3
depth = 1
[engine]
kind = "accelerate"
"""
