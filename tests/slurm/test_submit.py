"""Plans as jobs: they end done, stop and come back, crash and come back, or end with the reason; on a real cluster."""

import os
import signal

import pytest

from tests.command import losses, patchmill
from tests.slurm.cluster import wait_for
from tests.slurm.runs import SHARDS, TRAIN, Submitted, ranks_on, same, weights_of, write_plan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The final checkpoint of the plan, run here without a cluster."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = patchmill("run", write_plan(folder, SHARDS, TRAIN), cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return weights_of(max((folder / "runs/tiny/stages/train/checkpoints").glob("samples-*")))


def test_a_plan_of_two_stages_in_an_odd_place_ends_done(cluster, tmp_path, undisturbed, monkeypatch):
    for name, value in {"EXPORT": "NONE", "JOB_NAME": "mine", "NO_REQUEUE": "1"}.items():  # of its user's shell
        monkeypatch.setenv(f"SBATCH_{name}", value)
    folder = tmp_path / """it's "my" $(touch hacked) `x` ; # %j & plan"""
    folder.mkdir()
    run = Submitted(cluster, write_plan(folder, SHARDS, TRAIN))
    run.wait_for_end()
    assert list(run.jobs) == ["shards", "train"]
    assert same(run.weights("train"), undisturbed)
    assert run.shown("train")["Restarts"] == "0"
    assert not list(tmp_path.rglob("hacked"))
    again = patchmill("submit", folder / "plan.toml", "--json", cwd=folder)
    assert (again.returncode, again.stdout) == (0, "{}\n")  # all is done
    script = (run.run / "slurm" / "train.sbatch").read_text()
    assert "--nodes=2\n" in script
    assert "--ntasks-per-node=1\n" in script


def test_whatever_is_edited_beside_the_plan_jobs_go_by_what_was_submitted(cluster, tmp_path):
    table, settings = TRAIN.split("[stage.set]\n")
    (tmp_path / "own.toml").write_text(settings.replace("700 steps", "400 steps"))
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, table + 'recipe = "own.toml"\n'))
    (tmp_path / "own.toml").write_text("broken [")
    run.plan.write_text("broken [")
    run.wait_for_steps("train", 60)
    cluster.run("scontrol", "requeue", run.jobs["train"])
    run.wait_for_end()
    assert (run.record("train")["state"], run.record("train")["tries"]) == ("done", 2)
    assert losses(run.stage("train"))[-1][0] == 400 * 12


@pytest.mark.timeout(1200)
def test_stopped_in_every_way_it_comes_back_and_ends_with_the_same_weights(cluster, tmp_path, undisturbed):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN))
    number = run.jobs["train"]
    run.wait_for_steps("train", 60)
    cluster.run("scancel", "--signal=TERM", number)  # as at pre-emption: the ranks get it, the script does not
    wait_for(lambda: run.shown("train")["Restarts"] == "1", 120, "the first restart")
    assert run.record("train")["reason"].startswith("stopped on request")
    assert (run.stage("train") / "stopped.json").exists()

    steps = losses(run.stage("train"))[-1][0] // 12
    run.wait_for_steps("train", steps + 40)
    cluster.run("scancel", "--batch", "--signal=USR2", number)  # as before the time limit: the script gets it
    wait_for(lambda: run.shown("train")["Restarts"] == "2", 120, "the second restart")

    steps = losses(run.stage("train"))[-1][0] // 12
    run.wait_for_steps("train", steps + 60)
    os.kill(min(ranks_on(cluster, "n2")), signal.SIGKILL)
    wait_for(lambda: run.shown("train")["Restarts"] == "3", 120, "the third restart")
    assert "Killed" in run.record("train")["reason"]

    steps = losses(run.stage("train"))[-1][0] // 12
    run.wait_for_steps("train", steps + 20)
    cluster.run("scontrol", "requeue", number)
    run.wait_for_end()
    assert same(run.weights("train"), undisturbed)
    record = run.record("train")
    assert (record["state"], record["tries"], record["reason"]) == ("done", 5, None)
    samples = [line[0] for line in losses(run.stage("train"))]
    assert samples == sorted(set(samples))  # one history
    assert samples[-1] == 700 * 12
