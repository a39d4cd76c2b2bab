"""The example's plan, whole: pre-empted twice, once without a node, and the same to the bit in the end."""

import pytest

from tests.command import ROOT
from tests.slurm.cluster import wait_for
from tests.slurm.runs import Submitted, same

EPOCH = 1791  # samples
PROFILE = """
partition = "low"
ranks_per_node = 1
env = { OMP_NUM_THREADS = "1" }
"""


@pytest.mark.slurm
@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_pre_empted_twice_and_without_a_node_once_it_ends_with_the_same_weights(cluster, tmp_path):
    runs = {}
    for name in ("undisturbed", "disturbed"):
        folder = tmp_path / name
        folder.mkdir()
        run = runs[name] = Submitted(cluster, ROOT / "examples/clipart.toml", PROFILE, folder)
        if name == "disturbed":
            disturb(run)
        run.wait_for_end(1800)
    one, other = runs.values()
    for stage in ("pretrain", "finetune", "scratch"):
        assert same(other.weights(stage), one.weights(stage)), stage
    assert other.result("evaluate")["top1"] == one.result("evaluate")["top1"]
    assert other.record("pretrain")["tries"] == 4
    assert [other.record(stage)["state"] for stage in other.jobs] == ["done"] * 8
    assert (other.run / "report.html").stat().st_size > 100_000


def disturb(run: Submitted) -> None:
    """Let a job of more weight take the nodes at 8 and at 20 epochs of the pre-training, and lose one after 32."""
    for number, epochs in enumerate((8, 20), start=1):
        run.wait_for_samples("pretrain", epochs * EPOCH, 1200)
        above = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
        run.cluster.run("sbatch", *above)
        wait_for(lambda number=number: run.shown("pretrain")["Restarts"] == str(number), 90, "the job to make room")
        assert run.record("pretrain")["reason"].startswith("stopped on request")
    run.wait_for_samples("pretrain", 32 * EPOCH, 1200)
    run.cluster.kill_node("n2")
    wait_for(lambda: run.shown("pretrain")["Restarts"] == "3", 90, "the node to be missed")
    run.cluster.start_node("n2")
