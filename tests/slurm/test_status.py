"""What `patchmill status`, `logs` and `cancel` tell of jobs on a real cluster."""

import json
import re
import subprocess
import sys

import pytest

from pipeline.models import create_model
from pipeline.weights import write_weights
from tests.command import environment, patchmill, refused
from tests.slurm.runs import SHARDS, TRAIN, Submitted, write_plan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
BROKEN = """
[[stage]]
name = "broken"
kind = "convert"
set = { source = "weights.safetensors", to = "npz" }

[[stage]]
name = "follower"
kind = "evaluate"
set = { weights = "{broken}", data = "{shards}/val" }
"""


AFTER = """
[[stage]]
name = "after"
kind = "evaluate"
set = { weights = "{train}", data = "{shards}/val" }
"""


def status(run: Submitted, **env: str) -> dict[str, dict]:
    done = patchmill("status", run.run, "--json", cwd=run.run, **env)
    assert done.returncode == 0, done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)}


def test_a_run_is_followed_cancelled_and_goes_on(cluster, tmp_path):
    later = '\n[stage.shards]\nsbatch = ["--begin=now+30"]'
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN.replace("700", "2000")), "ranks_per_node = 2" + later)
    stages = status(run)
    assert [stages[name]["state"] for name in ("shards", "train")] == ["waiting", "waiting"]
    assert [stages[name]["why"] for name in ("shards", "train")] == ["waits: BeginTime", "after shards"]
    run.wait_for_samples("train", 12 * 60, 150)
    train = status(run)["train"]
    assert (train["state"], train["job"]) == ("running", run.jobs["train"])
    assert train["step"] >= 60
    assert train["share"] == train["step"] / 2000
    assert train["seconds_left"] == pytest.approx((2000 - train["step"]) * 12 / train["images_per_second"])
    without = status(run, PATH="/nowhere")["train"]  # the folder alone
    assert without["state"] == "running"

    again = refused(patchmill("submit", tmp_path / "plan.toml", cwd=tmp_path))
    assert "jobs of" in again
    assert "are in the queue (train)" in again

    log = patchmill("logs", "train", "--run", run.run, cwd=tmp_path)
    assert re.search(r"train: try 1 on n[12], from the start", log.stdout)
    done = patchmill("cancel", run.run, cwd=tmp_path)
    assert done.stdout == "cancelled: train\n"
    assert status(run)["train"]["state"] == "cancelled"
    assert not cluster.run("squeue", "-h")
    assert run.shown("train")["JobState"] == "CANCELLED"

    command = [sys.executable, "-m", "launch.cli", "run", "plan.toml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment())
    run.wait_for_steps("train", status(run)["train"]["step"] + 20)
    process.terminate()
    assert process.wait(60) == 75
    assert (status(run)["train"]["state"], status(run)["train"]["job"]) == ("stopped", None)

    run = Submitted(cluster, tmp_path / "plan.toml")  # goes on, on two nodes in place of one
    assert list(run.jobs) == ["train"]
    run.wait_for_end()
    train = status(run)["train"]
    assert (train["state"], train["step"], train["share"]) == ("done", 2000, 1.0)
    assert run.record("train")["nodes"] == "n[1-2]"
    assert "from the start" not in run.log("train").split("train: try 1 on")[2]


def test_a_stage_that_fails_takes_its_followers_with_it_and_status_says_why(cluster, tmp_path):
    head, *stages = (SHARDS + BROKEN).split("[[stage]]")
    plan = write_plan(tmp_path, head, *(f"[[stage]]{each}" for each in reversed(stages)))  # the last is written first
    model = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1, "image_size": 16, "num_classes": 0}
    model |= {"registers": 2}  # of which the official code has none: found when they are converted
    write_weights(tmp_path / "weights.safetensors", create_model(**model).state_dict(), {"model": model, "classes": []})
    run = Submitted(cluster, plan, f"setup = ['until [ -e {tmp_path}/go ]; do sleep 0.2; done']")
    waiting = status(run)
    assert list(waiting) == ["follower", "broken", "shards"]
    assert waiting["follower"]["why"] == "after broken, shards"
    (tmp_path / "go").touch()
    run.wait_for_end()
    stages = status(run)
    assert stages["shards"]["state"] == "done"
    assert stages["broken"]["state"] == "failed"
    assert "weights.safetensors" in stages["broken"]["why"]
    assert stages["broken"]["restarts"] == 0  # it would fail again
    assert (stages["follower"]["state"], stages["follower"]["why"]) == ("cancelled", "broken failed")
    shown = patchmill("status", run.run, cwd=tmp_path).stdout
    assert "broken failed" in shown
    assert run.shown("broken")["ExitCode"] == "2:0"


def test_a_script_that_ends_before_its_job_begins_has_failed_and_status_says_what_it_said(cluster, tmp_path):
    head, stage = SHARDS.split("[[stage]]")
    names = ("modules", "setup", "python", "container")
    plan = write_plan(tmp_path, head, *(f"[[stage]]{stage}".replace('"shards"', f'"{name}"', 1) for name in names))
    profile = """
        [stage.modules]
        modules = ["nope/1.0"]
        [stage.setup]
        setup = ["echo 'no scratch on $SLURMD_NODENAME' >&2; exit 3"]
        [stage.python]
        setup = ["export PYTHONHOME=/nowhere"]
        [stage.container]
        container = ["/nowhere/apptainer", "exec"]
    """
    run = Submitted(cluster, plan, profile)
    run.wait_for_end()
    stages = status(run)
    assert {stage["state"] for stage in stages.values()} == {"failed"}
    why = {name: stage["why"] for name, stage in stages.items()}
    assert why["modules"] == "in its script, before launch.job: error: module load nope/1.0 failed"
    assert why["setup"] == "in its script, before launch.job: no scratch on $SLURMD_NODENAME"
    assert why["python"].startswith("in its script, before launch.job: ")
    assert "No module named 'encodings'" in run.log("python")
    assert why["container"].startswith("execve(): /nowhere/apptainer: No such file or directory; mend it")
    assert run.shown("modules")["ExitCode"] == "2:0"

    run = Submitted(cluster, plan, "")
    run.wait_for_end()
    assert [(stage["state"], stage["why"]) for stage in status(run).values()] == [("done", "")] * 4

    plan.write_text(plan.read_text().replace("shard_samples = 16", "shard_samples = 8"))
    run = Submitted(cluster, plan, profile)
    run.wait_for_end()
    assert {stage["state"] for stage in status(run).values()} == {"failed"}  # whatever other settings made before


def test_a_job_of_anothers_that_has_the_number_of_an_old_one_is_left_alone(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS))
    run.wait_for_end()
    other = cluster.run("sbatch", "--parsable", "--job-name=other", "--output=/dev/null", "--wrap=sleep 300").strip()
    path = run.run / "slurm" / "submission.json"  # as of a cluster that began to count anew since
    path.write_text(path.read_text().replace(f'"id": "{run.jobs["shards"]}"', f'"id": "{other}"'))
    assert status(run)["shards"]["state"] == "done"
    assert status(run)["shards"]["job"] == other
    again = patchmill("submit", run.plan, "--json", cwd=tmp_path)
    assert (again.returncode, again.stdout) == (0, "{}\n")
    assert patchmill("cancel", run.run, cwd=tmp_path).stdout == f"no job of {run.run} is in the queue\n"
    assert cluster.run("squeue", "-h", "-o", "%i").split() == [other]
    cluster.run("scancel", other)


def test_what_a_queue_does_not_show_has_not_ended(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN.replace("700 steps", "9000 steps"), AFTER))
    run.wait_for_steps("train", 60)
    hiding = {
        "SQUEUE_STATES": "PENDING",
        "SQUEUE_PARTITION": "low",
        "SQUEUE_USERS": "nobody",
        "SCANCEL_STATE": "PENDING",
    }
    assert {name: stage["state"] for name, stage in status(run, **hiding).items()} == {
        "shards": "done", "train": "running", "after": "waiting"
    }  # fmt: skip

    path = run.run / "slurm" / "submission.json"
    whole = path.read_text()
    assert '"cluster": "patchmill"' in whole
    path.write_text(whole.replace('"cluster": "patchmill"', '"cluster": "elsewhere"'))
    told = (
        "the jobs of tiny were submitted to cluster elsewhere, and this is patchmill; ask there, or, when they have end"
    )
    seen = patchmill("status", run.run, cwd=tmp_path)
    assert f"warning: {told}" in seen.stderr
    assert re.search(r"train +running .*\n *after +waiting ", seen.stdout)
    for command in (["submit", run.plan], ["run", run.plan], ["cancel", run.run]):
        assert refused(patchmill(*command, cwd=tmp_path)).startswith(f"error: {told}")

    numbers = {number: str(int(number) + 90000) for number in run.jobs.values()}  # of none that this cluster has
    path.write_text(re.sub(r'"id": "(\d+)"', lambda found: f'"id": "{numbers[found[1]]}"', whole))
    seen = patchmill("status", run.run, cwd=tmp_path)
    assert "warning: ranks of train are at work, although no queue here has their jobs; this is what" in seen.stderr
    assert re.search(r"train +running .*\n *after +waiting ", seen.stdout)
    assert "(train on n[1-2]), although no queue" in refused(patchmill("submit", run.plan, cwd=tmp_path))
    assert not (run.stage("train") / "logs" / "stop").exists()

    path.write_text(whole)
    assert patchmill("cancel", run.run, cwd=tmp_path, **hiding).stdout == "cancelled: train, after\n"


def test_without_a_queue_and_with_a_wrong_name(tmp_path):
    plan = write_plan(tmp_path, SHARDS)
    assert patchmill("run", plan, cwd=tmp_path).returncode == 0
    run = tmp_path / "runs" / "tiny"
    stages = json.loads(patchmill("status", run, "--json", cwd=tmp_path).stdout)
    assert [(stage["name"], stage["state"], stage["job"]) for stage in stages] == [("shards", "done", None)]
    assert "no job of" in refused(patchmill("cancel", run, cwd=tmp_path))
    assert "has no stage 'shard'; it has shards" in refused(patchmill("logs", "shard", cwd=tmp_path))
    assert "is no run" in refused(patchmill("status", "images", cwd=tmp_path))
    assert "is no run" in refused(patchmill("cancel", "images", cwd=tmp_path))
