"""The engines on real devices, one rank each: the same losses in many ways to train, in as much memory as estimated.

None of this has run on a card yet; its worker has, on a CPU. With a single device, stages share nothing.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.estimate import ROOM
from pipeline.memory import MemoryEstimate
from pipeline.settings import check, merge
from tests.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WORKER = Path(__file__).parent / "worker_memory.py"
RANKS = max(1, torch.cuda.device_count())
BASE = {
    "duration": "1 epoch", "global_batch": 32 * RANKS, "micro_batch": 32, "data": {"train": "-"},
    "model": {"name": "vit_b16"}, "optim": {"clip": 1.0},
}  # fmt: skip
B16 = {"name": "vit_b16", "num_classes": 1000}
OFFLOAD = {"offload_optimizer": "cpu"}
WAYS = {
    "accelerate-bfloat16": {"kind": "accelerate", "precision": "bfloat16"},
    "accelerate-compiled": {"kind": "accelerate", "precision": "bfloat16", "compile": True},
    **{f"zero{stage}-bfloat16": {"zero_stage": stage, "precision": "bfloat16"} for stage in range(4)},
    **{f"zero{stage}-float16": {"zero_stage": stage, "precision": "float16"} for stage in (1, 2, 3)},
    "zero2-recompute": {"zero_stage": 2, "precision": "bfloat16", "recompute_every": 1},
    "zero3-compiled": {"zero_stage": 3, "precision": "bfloat16", "compile": True},
    "zero2-offloaded": {"zero_stage": 2, "precision": "bfloat16", **OFFLOAD},
    "zero3-all-offloaded": {"zero_stage": 3, "precision": "bfloat16", **OFFLOAD, "offload_parameters": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, list[dict]]:
    """What each rank found in each way to train, and in float32."""
    ways = {"float32": {"kind": "accelerate", "precision": "float32"}, **WAYS}
    asked = json.dumps([{"settings": merge(BASE, {"engine": way}), "model": B16} for way in ways.values()])
    found = run_on_ranks(WORKER, RANKS, asked, timeout=540)
    return {name: [rank[number] for rank in found] for number, name in enumerate(ways)}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_float32(measured, way):
    for rank, plain in zip(measured[way], measured["float32"], strict=True):
        assert rank["losses"] == pytest.approx(plain["losses"], rel=0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_the_allocators_peak_is_what_is_estimated(measured, way):
    for rank in measured[way]:
        print(f"{way}: {rank['estimated'] / 1e9:.2f} GB estimated, {rank['allocated'] / 1e9:.2f} GB allocated")
        assert rank["estimated"] == pytest.approx(rank["allocated"], rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_vit_h_trains_at_a_batch_that_fills_a_card():
    """Where the card has 80 GB at least: with the largest micro-batch that is said to fit."""
    total = torch.cuda.get_device_properties(0).total_memory
    if total < 79e9:
        pytest.skip("needs a card of 80 GB")
    model = {"name": "vit_h14", "num_classes": 1000}
    over = {"global_batch": 512 * RANKS, "micro_batch": None, "model": {"name": "vit_h14"}}
    over |= {"engine": {"zero_stage": 2, "precision": "bfloat16", "compile": True}}
    settings = merge(BASE, over)
    memory = MemoryEstimate(check(TrainSettings, settings, "test"), model, RANKS, cuda=True)
    settings |= {"micro_batch": memory.largest(ROOM * total)}
    for rank in run_on_ranks(WORKER, RANKS, json.dumps([{"settings": settings, "model": model}]), timeout=540):
        assert all(math.isfinite(loss) for loss in rank[0]["losses"])
        assert rank[0]["estimated"] == pytest.approx(rank[0]["allocated"], rel=0.1)
        assert rank[0]["allocated"] > 0.5 * total
