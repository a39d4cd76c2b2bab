"""A training run on broken data, killed and rolled back, is audited by the command line."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from shards.audit import audit
from shards.dataset import Dataset
from shards.quarantine import read_quarantine
from tests.command import done, losses, patchmill, wait_for_steps
from tests.images import build_image_set
from tests.integration.test_train_ranks import launch
from tests.shards.datasets import damage

BROKEN = [(0, 3), (2, 0)]


def kill_after(process: subprocess.Popen, run: Path, steps: int, saves: int) -> None:
    """Kill launcher and ranks with SIGKILL once so many steps were logged, and so many checkpoints committed."""
    wait_for_steps(run, process, steps, saves)
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)  # first, so that it does not end the ranks in peace
    for child in children:
        child.kill()
    process.communicate()
    psutil.wait_procs(children, timeout=60)


def audit_command(stage: Path) -> tuple[int, dict]:
    done = patchmill("shards", "audit", stage, "--json", cwd=stage.parent)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.long
def test_killed_rolled_back_and_on_other_ranks_each_position_came_once(tmp_path):
    train = build_image_set(tmp_path, per_class=16, split={"val": 0.2}, shard_samples=8) / "train"
    damage(train, BROKEN)
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
