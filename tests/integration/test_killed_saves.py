"""Killed at random points of a save, one rank or all: every checkpoint is whole, and the run ends bit-identical."""

from pathlib import Path

import pytest

from tests.images import build_image_set
from tests.ranks import run_on_ranks

WORKER = Path(__file__).with_name("worker_killed.py")


def killed(folder: Path, points: int, seed: int, timeout: float) -> dict:
    build_image_set(folder, per_class=10, shard_samples=7)
    found = run_on_ranks(WORKER, 1, folder, points, seed, timeout=timeout)[0]
    assert len(found["kills"]) == points
    for kill in found["kills"]:
        assert kill["wrong"] == [], kill
    assert found["same"], found
    assert found["wrong"] == found["left"] == []
    return found


@pytest.mark.long
def test_killed_in_three_saves_a_run_ends_bit_identical(tmp_path):
    found = killed(tmp_path, 3, 1, 150)
    assert min(found["calls"]) > 100  # so many points there are


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_in_30_saves_a_run_ends_bit_identical(tmp_path):
    found = killed(tmp_path, 30, 0, 1000)
    assert {kill["victim"] for kill in found["kills"]} == {"rank 0", "rank 1", "all"}
    assert len([kill for kill in found["kills"] if kill["left"]]) > 5  # many were in the middle of writing
    print(found)
