"""Stages that do not train, and are asked to stop: they go back into the queue, and on from what is finished."""

import re

import pytest

from tests.command import patchmill
from tests.images import make_slow_images
from tests.slurm.cluster import wait_for
from tests.slurm.runs import SHARDS, Submitted, write_plan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SLOW = SHARDS.replace("split = { val = 0.25 }, shard_samples = 16, workers = 1", 'shard_samples = 4, format = "webp"')


def submitted(cluster, folder, images: int, profile: str, workers: int) -> Submitted:
    """Submit a build of so many images, four a shard, each of which takes a while."""
    plan = write_plan(folder, SLOW.replace('"webp"', f'"webp", workers = {workers}'))
    make_slow_images(folder / "images", images)
    return Submitted(cluster, plan, profile)


def written(run: Submitted) -> dict[str, int]:
    """Return when each finished shard was written, by its path."""
    tables = run.stage("shards").glob("data/manifest/samples/[0-9]*.parquet")
    tars = [table.parents[2] / "shards" / f"{table.stem}.tar" for table in tables]
    return {str(tar): tar.stat().st_mtime_ns for tar in tars}


def test_a_build_that_is_told_to_stop_goes_on_from_its_finished_shards(cluster, tmp_path):
    run = submitted(cluster, tmp_path, 96, "retries = 0", workers=2)
    for restarts, options in ((1, ["--signal=USR1"]), (2, ["--batch", "--signal=USR2"])):  # the second as a time limit
        before = written(run)
        wait_for(lambda before=before: len(written(run)) > len(before) + 1, 90, "shards")
        before = written(run)
        cluster.run("scancel", *options, run.jobs["shards"])
        wait_for(lambda: run.shown("shards")["Restarts"] == str(restarts), 60, "the restart")  # noqa: B023
        record = run.record("shards")
        assert record["state"] == "stopped"
        number = re.fullmatch(r"stopped on request at (\d+) shards", record["reason"])[1]
        assert int(number) >= len(before)
        assert before.items() <= written(run).items()  # none of them was written again
    run.wait_for_end()
    record = run.record("shards")
    assert (record["state"], record["tries"]) == ("done", 3)
    assert len(written(run)) == 30  # of 120 images, 4 each
    assert patchmill("shards", "verify", run.stage("shards") / "data", cwd=tmp_path).returncode == 0
    assert "crashed" not in run.log("shards")
