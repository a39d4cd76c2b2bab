"""A training run on broken data, killed and rolled back, is audited by the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from shards import manifest
from shards.audit import audit
from shards.build import build
from shards.dataset import Dataset
from shards.quarantine import read_quarantine
from tests.images import make_image_folder
from tests.integration.test_train_ranks import ROOT, done, launch, losses

BROKEN = [(0, 3), (2, 0)]


def kill_after(process: subprocess.Popen, run: Path, steps: int, saves: int) -> None:
    """Kill launcher and ranks with SIGKILL once so many steps were logged, and so many checkpoints committed."""
    deadline = time.monotonic() + 120
    while len(losses(run)) < steps or len(list(run.glob("checkpoints/*/checkpoint.json"))) < saves:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # first, so that it does not end the ranks in peace
    for child in children:
        child.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=60)


def audit_command(stage: Path) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "shards", "audit", str(stage), "--json"],
        cwd=stage.parent, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_killed_rolled_back_and_on_other_ranks_each_position_came_once(tmp_path):
    make_image_folder(tmp_path / "images", per_class=16)
    build(tmp_path / "images", tmp_path / "set", split={"val": 0.2}, shard_samples=8, workers=1)
    train = tmp_path / "set" / "train"
    for shard, index in BROKEN:
        rows = Dataset.open(train).rows(shard)
        with open(train / manifest.shard_path(shard), "r+b") as tar:
            tar.seek(int(rows.offset[index]) + 40)
            tar.write(bytes(60))
    run = tmp_path / "run"

    kill_after(launch(tmp_path, 2, run.name, epochs=10), run, steps=16, saves=2)
    assert audit(run).counts == {}  # what the last checkpoint saw
    (max(run.glob("checkpoints/samples-*")) / "rank-00001.safetensors").write_bytes(b"damaged")
    code, stderr = done(launch(tmp_path, 3, run.name, epochs=10))
    assert code == 0, stderr
    assert "falling back to the one before" in stderr

    code, found = audit_command(run)
    assert (code, found["counts"], found["misfits"]) == (0, {}, [])
    samples = len(Dataset.open(train))
    assert found["positions"] == losses(run)[-1][0]
    assert [(each["samples"], each["epochs"]) for each in found["sources"]] == [
        (samples, found["positions"] // samples)
    ]
    assert found["ranks"] == [2, 3]
    assert found["replaced"] == len(BROKEN)
    assert sorted((each["shard"], each["index"]) for each in read_quarantine(run / "quarantine.jsonl")) == BROKEN

    (run / "quarantine.jsonl").unlink()
    assert audit(run).counts == {"stand-in": found["stand_ins"]}
