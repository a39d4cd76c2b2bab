"""A run that hangs: it ends by itself, says which rank is where, and leaves every rank's stacks."""

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests.command import TRAIN, environment
from tests.images import build_image_set
from tests.ranks import ends_of_ranks

WORKER = Path(__file__).parents[1] / "pipeline" / "worker_hang.py"
LENGTHS = ["duration=30 steps", "checkpoint.every=30 steps", "evaluate.every=30 steps"]
OVER = [*LENGTHS, "data.allow_pipe=true", "watchdog=2"]


@pytest.mark.long
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
    assert re.match(r"no step for \d+ s at 0 samples \(watchdog = 2 seconds\); the stacks are in ", error)
    assert re.match(r"rank 0 on .*, process \d+: waiting for data for \d+ s, of pipe:sleep 1000", rank)
    (told,) = (tmp_path / "run" / "logs").glob("hang-samples-*/rank-00000.txt")
    text = told.read_text()
    assert text.startswith(rank)
    assert 'stream.py"' in text  # the stack of the thread that waits


@pytest.mark.parametrize("number", [pytest.param(5, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_hangs_is_named_by_all_with_the_stacks_of_all(tmp_path, number):
    build_image_set(tmp_path, per_class=8)
    ranks = ends_of_ranks(WORKER, 2, tmp_path, number, timeout=100)
    told = [rank.stderr for rank in ranks]
    assert [rank.code for rank in ranks] == [1, 1], told
    samples = 12 * (number - 1)
    folder = tmp_path / "run" / "logs" / f"hang-samples-{samples:012d}"
    expected = rf"error: no step for \d+ s at {samples} samples \(watchdog = 3 seconds\); the stacks are in {folder}; "
    assert all(re.search(expected, each) for each in told), told
    lines = [
        f"rank 1 on .*, process {ranks[1].pid}: waiting for data for ",
        f"rank 0 on .*, process {ranks[0].pid}: training for ",
    ]
    assert re.search(r"\n  ".join(f"{line}.*" for line in lines), told[0]), told[0]
    assert re.search(lines[0], told[1]), told[1]
    assert os.listdir(folder.parent) == [folder.name]
    assert "in step" in (folder / "rank-00000.txt").read_text()
    assert "worker_hang.py" in (folder / "rank-00001.txt").read_text()


def test_a_file_system_that_hangs_delays_the_end_and_no_more(tmp_path):
    (tmp_path / "hang-samples-000000000000").mkdir()
    os.mkfifo(tmp_path / "hang-samples-000000000000" / "rank-00000.txt")  # to open it waits for a reader, for ever
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pipeline import watchdog\n"
        "watchdog.GRACE = 0.5\n"
        "with watchdog.Watchdog(Path(sys.argv[1]), 0.2, 0, lambda: []):\n"
        "    time.sleep(1000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60, env=environment()
    )
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    assert re.match(r"error: no step for 1 s at 0 samples .*; the stacks could not be written to /", first)
    assert re.match(r"  rank 0 on .*, process \d+: starting for 1 s", second)
