"""Commands that do not train, and are asked to stop: by the signals that Slurm, Kubernetes and people send."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import done, environment, patchmill
from tests.images import make_slow_images

BUILD = ("shards", "build", "images", "set", "--shard-samples", "2", "--format", "webp", "--workers")


def building(folder: Path, workers: int) -> subprocess.Popen:
    """Start a build of 12 shards in a group of its own, and wait until it has finished one."""
    make_slow_images(folder / "images", 24)
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *BUILD, str(workers)],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True,
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


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGTERM), (2, signal.SIGUSR1)])
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


def test_workers_still_end_when_one_of_them_dies(tmp_path):
    process = building(tmp_path, 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    code, stderr = done(process)
    assert code == 1
    assert "error: a worker process died" in stderr
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
