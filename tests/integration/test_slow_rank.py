"""Two ranks, of which one gets its data late, and then cannot decode an image of the held-out set."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import free_port
from shards.dataset import Dataset
from tests.command import environment
from tests.images import build_image_set

WORKER = Path(__file__).parents[1] / "pipeline" / "worker_slow.py"


@pytest.mark.slow
def test_the_slowest_rank_is_named_under_any_stage_and_an_error_in_evaluating_the_average_ends_all(tmp_path):
    build_image_set(tmp_path, per_class=12, split={"val": 0.5})
    val = Dataset.open(tmp_path / "set" / "val")
    rows = val.rows(0)
    with open(tmp_path / "set" / "val" / val.paths[0], "r+b") as tar:  # an image of rank 1, which has 4 to 7
        tar.seek(int(rows.offset[5]))
        tar.write(bytes(int(rows.size[5])))
    shared = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path)], stderr=subprocess.PIPE, text=True,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [each.communicate(timeout=60)[1] for each in ranks]
    finally:
        for each in ranks:
            each.kill()
    for stage in (3, 1):
        lines = [json.loads(line) for line in (tmp_path / f"run-{stage}" / "metrics.jsonl").read_text().splitlines()]
        for line in lines[1:3]:
            assert line["slowest_rank"] == 1
            assert 0.03 < line["slowest_rank_behind"] < 0.5  # half of its 0.2 s: the median of two is their mean
    assert [each.returncode for each in ranks] == [1, 1], told
    assert re.search(r"error: rank 1 on .* ended: .*decode", told[0]), told[0]
    assert re.search(r"error: .*decode", told[1]), told[1]
