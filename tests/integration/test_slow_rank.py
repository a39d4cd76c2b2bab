"""Two ranks, of which one gets its data late, and then cannot decode an image of the held-out set."""

import json
import re
from pathlib import Path

import pytest

from shards.dataset import Dataset
from tests.images import build_image_set
from tests.ranks import ends_of_ranks

WORKER = Path(__file__).parents[1] / "pipeline" / "worker_slow.py"


@pytest.mark.slow
def test_the_slowest_rank_is_named_under_any_stage_and_an_error_in_evaluating_the_average_ends_all(tmp_path):
    build_image_set(tmp_path, per_class=12, split={"val": 0.5})
    val = Dataset.open(tmp_path / "set" / "val")
    rows = val.rows(0)
    with open(tmp_path / "set" / "val" / val.paths[0], "r+b") as tar:  # an image of rank 1, which has 4 to 7
        tar.seek(int(rows.offset[5]))
        tar.write(bytes(int(rows.size[5])))
    ranks = ends_of_ranks(WORKER, 2, tmp_path, timeout=60)
    told = [rank.stderr for rank in ranks]
    for stage in (3, 1):
        lines = [json.loads(line) for line in (tmp_path / f"run-{stage}" / "metrics.jsonl").read_text().splitlines()]
        for line in lines[1:3]:
            assert line["slowest_rank"] == 1
            assert 0.03 < line["slowest_rank_behind"] < 0.5  # half of its 0.2 s: the median of two is their mean
    assert [rank.code for rank in ranks] == [1, 1], told
    assert re.search(r"error: rank 1 on .* ended: .*decode", told[0]), told[0]
    assert re.search(r"error: .*decode", told[1]), told[1]
