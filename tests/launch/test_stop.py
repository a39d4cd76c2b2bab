"""Commands that do not train, and are asked to stop: by the signals that Slurm, Kubernetes and people send."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from launch.status import status_of
from tests.command import done, environment, losses, patchmill
from tests.images import build_image_set, make_slow_images

BUILD = ("shards", "build", "images", "set", "--shard-samples", "2", "--format", "webp", "--workers")

TRAIN = """
[[stage]]
name = "train"
kind = "supervised"
ranks = 1
[stage.set]
duration = "40000 steps"
global_batch = 12
log_every = "10 steps"
data = { train = "set", resolution = 16 }
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }
engine = { kind = "accelerate" }
"""


def building(folder: Path, workers: int, hangup: Any = signal.SIG_DFL) -> subprocess.Popen:
    """Start a build of 12 shards in a group of its own, and wait until it has finished one."""
    make_slow_images(folder / "images", 24)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *BUILD, str(workers)],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not finished(folder):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def finished(folder: Path) -> dict[str, int]:
    """Return when each finished shard was written, nanoseconds, by its name."""
    tables = folder.glob("set/manifest/samples/[0-9]*.parquet")
    return {path.stem: (folder / f"set/shards/{path.stem}.tar").stat().st_mtime_ns for path in tables}


@pytest.mark.parametrize(
    ("workers", "number"),
    [
        (1, signal.SIGTERM),
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.long),
        pytest.param(2, signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_build_stops_when_all_of_its_processes_are_told_to_and_goes_on(tmp_path, workers, number):
    process = building(tmp_path, workers)
    os.killpg(process.pid, number)  # as Slurm does: every process of a step gets it
    code, stderr = done(process)
    assert code == 75, stderr
    assert [line for line in stderr.splitlines() if "rror" in line] == [
        "error: stopped on request; what is finished stays, run again to go on"
    ]
    before = finished(tmp_path)
    assert 0 < len(before) < 12
    again = patchmill(*BUILD, workers, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    after = finished(tmp_path)
    assert len(after) == 12
    assert {name: after[name] for name in before} == before  # not written again
    assert patchmill("shards", "verify", "set", cwd=tmp_path).returncode == 0


@pytest.mark.long
def test_a_build_that_nohup_started_does_not_hear_that_its_terminal_is_closed(tmp_path):
    process = building(tmp_path, 2, hangup=signal.SIG_IGN)
    os.killpg(process.pid, signal.SIGHUP)
    code, stderr = done(process)
    assert code == 0, stderr
    assert len(finished(tmp_path)) == 12


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_whose_terminal_is_closed_saves_and_goes_on_later(tmp_path, ranks):
    build_image_set(tmp_path, per_class=8)
    (tmp_path / "plan.toml").write_text(f"name = 'x'{TRAIN.replace('ranks = 1', f'ranks = {ranks}')}")
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "plan.toml"],
        cwd=tmp_path, env=environment(TERM="xterm"), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: (signal.signal(signal.SIGHUP, signal.SIG_DFL), fcntl.ioctl(0, termios.TIOCSCTTY, 0)),
    )  # fmt: skip
    os.close(theirs)
    stage, deadline = tmp_path / "runs/x/stages/train", time.monotonic() + 120
    while len(losses(stage)) < 3:
        os.read(ours, 4096)  # or it waits for us to look
        assert time.monotonic() < deadline
    os.close(ours)
    assert process.wait(60) == 75
    assert json.loads((stage / "stopped.json").read_text())["checkpoint"]
    (told,) = status_of(tmp_path / "runs/x")
    assert (told.state, told.why.split(" at ")[0]) == ("stopped", "stopped on request")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_piped_into_a_tee_that_ends_with_the_terminal_saves_all_the_same(tmp_path, ranks):
    build_image_set(tmp_path, per_class=8)
    (tmp_path / "plan.toml").write_text(f"name = 'x'{TRAIN.replace('ranks = 1', f'ranks = {ranks}')}")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "plan.toml"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    stage, deadline = tmp_path / "runs/x/stages/train", time.monotonic() + 120
    while len(losses(stage)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(60) == 75
    assert json.loads((stage / "stopped.json").read_text())["checkpoint"]
    (told,) = status_of(tmp_path / "runs/x")
    assert (told.state, told.why.split(" at ")[0]) == ("stopped", "stopped on request")


def test_workers_still_end_when_one_of_them_dies(tmp_path):
    process = building(tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    code, stderr = done(process)
    assert code == 1
    assert "error: a worker process died" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
