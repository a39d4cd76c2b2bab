"""A run that hangs: it ends by itself, says which rank is where, and leaves every rank's stacks."""

import re
import subprocess
import sys
import uuid

import psutil

from tests.command import TRAIN, environment
from tests.images import build_image_set

LENGTHS = ["duration=30 steps", "checkpoint.every=30 steps", "evaluate.every=30 steps"]
OVER = [*LENGTHS, "data.allow_pipe=true", "watchdog=3"]


def test_data_that_never_comes(tmp_path):
    build_image_set(tmp_path, per_class=8, split={"val": 0.5})
    command = f"sleep 1000 # {uuid.uuid4()}"
    (tmp_path / "c.toml").write_text(TRAIN.format(train=f"pipe:{command}", val="set/val"))
    try:
        with open(tmp_path / "told", "w") as told:  # no pipe: the command, which outlives the run, would keep it open
            done = subprocess.run(
                [sys.executable, "-m", "launch.cli", "train", "c.toml", "--out", "run", *OVER],
                cwd=tmp_path, stderr=told, timeout=120, env=environment(),
            )  # fmt: skip
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if command in (process.info["cmdline"] or ()):
                for each in (*process.children(), process):
                    each.kill()
    assert done.returncode == 1
    error, rank = re.search(r"error: (.*)\n  (rank .*)", (tmp_path / "told").read_text()).groups()
    assert re.match(r"no step for \d+ s at 0 samples \(watchdog = 3 seconds\); the stacks of 1 ranks are in ", error)
    assert re.match(r"rank 0 on .*, process \d+: waiting for data for \d+ s, of pipe:sleep 1000", rank)
    (told,) = (tmp_path / "run" / "logs").glob("hang-samples-*/rank-00000.txt")
    text = told.read_text()
    assert text.startswith(rank)
    assert 'stream.py"' in text  # the stack of the thread that waits
