"""A training stage on two data sets mixed 3:1, on two ranks: stopped on request, gone on with."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.build import build
from shards.dataset import Dataset
from tests.command import done, environment, losses, wait_for_steps
from tests.images import make_image_folder

PLAN = """
name = "mixed"
[[stage]]
name = "pretrain"
kind = "supervised"
ranks = 2
[stage.set]
duration = "5 epochs"
global_batch = 12
log_every = "1 step"
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }
engine = { kind = "accelerate" }
checkpoint = { every = "50 steps" }
evaluate = { every = "50 steps", batch = 4 }
[stage.set.data]
val = "a/val"
resolution = 16
[[stage.set.data.train]]
url = "a/train"
weight = 3
[[stage.set.data.train]]
url = "b"
weight = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    make_image_folder(folder / "images" / "a", per_class=20)
    make_image_folder(folder / "images" / "b", per_class=16, classes=("red", "blue"))
    build(folder / "images" / "a", folder / "a", split={"val": 0.1}, shard_samples=8, workers=1)
    build(folder / "images" / "b", folder / "b", shard_samples=8, workers=1)
    (folder / "plan.toml").write_text(PLAN)
    return folder


def start(folder: Path, runs: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", "plan.toml", "--runs", runs],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip


@pytest.mark.slow
def test_stopped_and_run_again_it_draws_the_same_samples(folder):
    whole, stopped = (folder / runs / "mixed" / "stages" / "pretrain" for runs in ("whole", "stopped"))
    code, stderr = done(start(folder, "whole"))
    assert code == 0, stderr

    process = start(folder, "stopped")
    wait_for_steps(stopped, process, 5)
    process.send_signal(signal.SIGTERM)
    assert done(process)[0] == 75
    assert losses(stopped) == losses(whole)[: len(losses(stopped))]
    assert len(losses(stopped)) < len(losses(whole))

    code, stderr = done(start(folder, "stopped"))
    assert code == 0, stderr
    assert losses(stopped) == losses(whole)
    epoch = sum(len(Dataset.open(folder / url)) for url in ("a/train", "b"))  # all sources together
    assert losses(whole)[-1][0] == round(5 * epoch / 12) * 12
