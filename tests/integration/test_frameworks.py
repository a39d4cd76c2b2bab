"""Nothing needs to wrap a loader: its batches are the same under torchrun, Accelerate and DeepSpeed."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from launch.local import free_port
from shards.augment import InceptionCrop
from shards.dataset import Dataset
from shards.loader import Loader
from tests.command import environment
from tests.images import build_image_set
from tests.integration.worker_frameworks import BATCH, STEPS, described

WORKER = Path(__file__).parent / "worker_frameworks.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_image_set(tmp_path_factory.mktemp("frameworks"), per_class=9, shard_samples=10)


@pytest.fixture(scope="module")
def alone(folder) -> list[list]:
    """Every batch of one process with no framework: [position, label, hash of the pixels] of each sample."""
    loader = Loader(Dataset.open(folder), global_batch=BATCH, transform=InceptionCrop(8), seed=5)
    return [described(batch) for batch in islice(loader, 2 * STEPS)]


@pytest.mark.long
@pytest.mark.parametrize("framework", ["accelerate", "deepspeed"])
def test_batches_are_the_same_under_torchrun_with(framework, folder, alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    done = subprocess.run(
        [*map(str, torchrun), str(WORKER), framework, str(folder), str(tmp_path)],
        capture_output=True, text=True, timeout=120, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert all(len(batch) == BATCH // 2 for rank in ranks for batch in rank)
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == alone
