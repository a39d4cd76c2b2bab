"""Stages that do not train, and are asked to stop: they go back into the queue, and on from what is finished."""

import os
import re
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.models import create_model
from pipeline.weights import write_weights
from tests.command import patchmill
from tests.images import make_image_folder, make_slow_images
from tests.slurm.cluster import wait_for
from tests.slurm.runs import SHARDS, Submitted, ranks_on, write_plan

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


EVALUATE = """
[[stage]]
name = "evaluate"
kind = "evaluate"
ranks = 2
set = { weights = "weights.safetensors", data = "{shards}/train", batch = 1 }
"""


def at_work(cluster, node: str) -> list[int]:
    """Return the ranks on a node that have torch by now."""
    found = []
    for pid in ranks_on(cluster, node):
        with suppress(OSError):
            found += [pid] if "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text() else []
    return found


def test_ranks_that_do_not_train_are_stopped_and_one_that_is_killed_is_a_crash(cluster, tmp_path):
    plan = write_plan(tmp_path, SHARDS, EVALUATE)
    make_image_folder(tmp_path / "more", per_class=80)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "more").rename(tmp_path / "images")
    model = {"name": "vit_ti8", "image_size": 224, "num_classes": 3}  # which takes a while
    weights = create_model(**model, seed=0).state_dict()
    write_weights(tmp_path / "weights.safetensors", weights, {"model": model, "classes": ["blue", "green", "red"]})
    run = Submitted(cluster, plan, "ranks_per_node = 1\nretries = 1")
    steps = (
        (lambda: os.kill(at_work(cluster, "n2")[0], signal.SIGKILL), "crashed", "n2: task 1: Killed"),
        (lambda: cluster.run("scancel", "--signal=TERM", run.jobs["evaluate"]), "stopped", "stopped on request"),
        (lambda: cluster.run("scancel", "--signal=USR1", run.jobs["evaluate"]), "stopped", "stopped on request"),
    )
    for restarts, (disturb, state, reason) in enumerate(steps, start=1):
        wait_for(lambda: at_work(cluster, "n1") and at_work(cluster, "n2"), 120, "both ranks")
        disturb()
        wait_for(lambda: run.shown("evaluate")["Restarts"] == str(restarts), 120, "the restart")  # noqa: B023
        record = run.record("evaluate")
        assert record["state"] == state
        assert reason in record["reason"]
        assert record["barren"] == 1
    run.wait_for_end()
    assert run.result("evaluate")["images"] > 150
    assert run.record("evaluate")["tries"] == 4


def test_a_build_that_is_told_to_stop_goes_on_from_its_finished_shards(cluster, tmp_path):
    run = submitted(cluster, tmp_path, 96, "retries = 0", workers=2)
    steps = ((["--signal=USR1"], "stopped on request"), (["--batch", "--signal=USR2"], "stopped on request"))
    for restarts, (options, why) in enumerate(steps, start=1):
        before = written(run)
        wait_for(lambda before=before: len(written(run)) > len(before) + 1, 90, "shards")
        before = written(run)
        cluster.run("scancel", *options, run.jobs["shards"])
        wait_for(lambda: run.shown("shards")["Restarts"] == str(restarts), 120, "the restart")  # noqa: B023
        record = run.record("shards")
        assert record["state"] == "stopped"
        number = re.fullmatch(rf"{why} at (\d+) shards", record["reason"])[1]
        assert int(number) >= len(before)
        assert before.items() <= written(run).items()  # none of them was written again
    run.wait_for_end()
    record = run.record("shards")
    assert (record["state"], record["tries"]) == ("done", 3)
    assert len(written(run)) == 30  # of 120 images, 4 each
    assert patchmill("shards", "verify", run.stage("shards") / "data", cwd=tmp_path).returncode == 0
    assert "crashed" not in run.log("shards")
