"""The doctor as the first step of jobs: what will not run ends at once, and slow nodes are left out if that can be."""

import json
import re

import pytest

from tests.slurm.runs import SHARDS, TRAIN, Submitted, write_plan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
SHORT = TRAIN.replace("700 steps", "60 steps")
GREEDY = SHORT.replace('"train"', '"greedy"').replace('{ every = "50 steps" }', "{ keep = 1_000_000_000 }")
# Once it has torch, it is at a tenth of the weight of what spins on the same core, whatever else this machine does.
BESIDE = 'renice -n 10 -p $$; taskset -cp 0 $$; exec taskset -c 0 sh -c "while kill -0 $$; do :; done"'
SPIN = f"(until grep -q libtorch_cpu /proc/$$/maps; do sleep 0.1; done; {BESIDE}) >/dev/null 2>&1 &"
SLOWED = f'case "$SLURMD_NODENAME $SLURM_PROCID $*" in "WHERE "*" doctor "*) {SPIN} esac; exec "$@"'
EMPTY = """exec unshare -m sh -c 'mount -t tmpfs none "$0" && exec "$@"' "$0" "$@" """
LESS = f'[ "$SLURMD_NODENAME" != n2 ] || {EMPTY}; exec "$@"'


def slowed(where: str) -> str:
    """Return the part of a profile that lets the doctor on one node and rank have little of its core."""
    return f"container = {json.dumps(['sh', '-c', SLOWED.replace('WHERE', where), 'rank'])}"


def test_a_stage_that_will_not_run_fails_before_it_begins_and_others_are_told_what_was_found(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, SHORT, GREEDY), "ranks_per_node = 1\ndoctor = true")
    run.wait_for_end()
    assert run.result("train")["steps"] == 60
    for told in ("2 on n1, n2, each on CPU", "GB/s each way between two ranks", "train: folder", "train: memory"):
        assert told in run.log("train")
    assert "1 on n" in run.log("shards")

    record = run.record("greedy")
    assert (record["state"], record["tries"]) == ("failed", 1)
    assert record["reason"].startswith("the plan will not run here: greedy: checkpoints: 1000000001 of ")
    assert record["reason"].endswith("or give another --runs; mend it, then submit the plan again")
    assert run.shown("greedy")["ExitCode"] == "2:0"
    assert re.search(r"^error +greedy: checkpoints +1000000001 of", run.log("greedy"), re.MULTILINE)
    assert not run.stage("greedy").exists()


def test_a_node_that_cannot_read_the_shards_is_named(cluster, tmp_path):
    """Of two nodes on one machine, the second has an empty disk where the first has the shards."""
    tars = tmp_path / "runs" / "tiny" / "stages" / "shards" / "data" / "train" / "shards"
    profile = (
        f"ranks_per_node = 1\n[stage.train]\ndoctor = true\ncontainer = {json.dumps(['sh', '-c', LESS, str(tars)])}"
    )
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, SHORT), profile)
    run.wait_for_end()
    record = run.record("train")
    assert (record["state"], record["tries"]) == ("failed", 1)
    assert record["reason"].startswith("the plan will not run here: train: data: on n2: ")
    assert str(tars) in record["reason"]
    assert re.search(r"^error +train: data +on n2: ", run.log("train"), re.MULTILINE)
    assert re.search(r"^ok +train: data +\d+ samples in ", run.log("train"), re.MULTILINE)  # of n1
    assert not run.stage("train").exists()


def test_a_container_that_is_missing_is_told_before_the_doctor_can_look(cluster, tmp_path):
    profile = 'doctor = true\ncontainer = ["/nowhere/apptainer", "exec"]'
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), profile)
    run.wait_for_end()
    record = run.record("shards")
    assert record["state"] == "failed"
    assert record["reason"].startswith("execve(): /nowhere/apptainer: No such file or directory; mend it")


def test_a_node_with_a_slow_rank_is_left_out(cluster, tmp_path):
    profile = f"ranks_per_node = 2\n[stage.train]\ndoctor = true\n{slowed('n1 1')}"
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, SHORT), profile)
    run.wait_for_end(500)  # a rank that has little of a busy core takes minutes to start
    assert run.result("train")["steps"] == 60
    assert "slower than the others: n1: excluded: back into the queue" in run.log("train")
    assert (run.record("train")["nodes"], run.record("train")["tries"]) == ("n2", 2)
    assert run.shown("train")["ExcNodeList"] == "n1"


def test_a_slow_node_that_the_job_cannot_do_without_is_named(cluster, tmp_path):
    profile = f"ranks_per_node = 1\n[stage.train]\ndoctor = true\n{slowed('n2 1')}"
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, SHORT), profile)
    run.wait_for_end(500)  # a rank that has little of a busy core takes minutes to start
    assert run.result("train")["steps"] == 60
    assert "but rank 1 on n2" in run.log("train")
    assert "slower than the others: n2; goes on with them, for want of others" in run.log("train")
    assert (run.record("train")["nodes"], run.record("train")["tries"]) == ("n[1-2]", 1)
