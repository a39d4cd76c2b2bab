"""A large build, killed again and again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards.dataset import Dataset
from tests.shards.images import encode, tree

IMAGES, KILLS = 20_000, 10
COMMAND = [sys.executable, "-m", "launch.cli", "shards", "build"]
OPTIONS = ["--shard-samples", "500", "--split", "val=0.05"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_thousand_images_killed_at_ten_random_moments(tmp_path):
    source = tmp_path / "source"
    for i in range(IMAGES):
        path = source / f"class{i % 20:02d}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i, size=(40, 30)))

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out, workers):
        return subprocess.Popen(
            [*COMMAND, source, out, *OPTIONS, "--workers", workers],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    began = time.monotonic()
    assert start(tmp_path / "whole", "1").wait(timeout=300) == 0
    duration = time.monotonic() - began

    rng = random.Random(0)
    killed, struck, redone = 0, 0, []
    out = tmp_path / "out"
    written: dict[Path, int] = {}
    while killed < KILLS:
        build = start(out, rng.choice("123"))
        time.sleep(rng.uniform(0.2, 0.9) * duration)
        if build.poll() is not None:  # done before its time: begin anew
            assert build.returncode == 0
            shutil.rmtree(out)
            written = {}
            continue
        build.send_signal(signal.SIGKILL)
        build.wait(timeout=30)
        time.sleep(0.5)  # until its workers have noticed
        killed += 1
        struck += any(out.rglob(".*.partial"))  # in the middle of a shard
        times = {path: path.stat().st_mtime_ns for path in out.glob("*/manifest/samples/*.parquet")}
        redone.append(sum(times.get(path) != old for path, old in written.items()))
        written = times
    assert struck  # else the kills prove nothing
    assert start(out, "2").wait(timeout=300) == 0
    assert sum(redone) == 0  # a shard with its receipt is never written again
    assert tree(out) == tree(tmp_path / "whole")
    assert len(Dataset.open(out / "train")) + len(Dataset.open(out / "val")) == IMAGES
