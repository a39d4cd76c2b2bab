"""What goes wrong on a cluster, and what becomes of the jobs; see also test_submit.py for stops of all kinds."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from launch.requeue import keep_off
from tests.command import done, environment, losses, patchmill, refused
from tests.slurm.cluster import wait_for
from tests.slurm.runs import SHARDS, TRAIN, Submitted, ranks_on, write_plan

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_lost_node_and_a_restarted_controller(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN))
    run.wait_for_steps("train", 60)
    cluster.end("slurmctld", signal.SIGKILL)
    run.wait_for_steps("train", losses(run.stage("train"))[-1][0] // 12 + 20)  # nobody noticed
    cluster.start_controller()
    wait_for(lambda: run.shown("train").get("JobState") == "RUNNING", 30, "the controller to know its jobs")

    saved = {path.parent.name for path in run.stage("train").glob("checkpoints/*/checkpoint.json")}
    cluster.kill_node("n2")
    wait_for(lambda: run.shown("train")["Restarts"] == "1", 120, "the node to be missed")
    assert saved
    cluster.start_node("n2")
    run.wait_for_end()
    assert run.result("train")["samples"] == 700 * 12
    assert "from the start" not in run.log("train").split("train: try 2 on")[1]


def test_a_node_that_is_lost_while_its_ranks_live_on_and_the_next_try_waits_for_them(cluster, tmp_path):
    long = TRAIN.replace("700 steps", "9000 steps")
    cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, long), "ranks_per_node = 2")
    run.wait_for_steps("train", 60)
    cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert run.record("train")["nodes"] == "n2"
    ranks = ranks_on(cluster, "n2")
    assert len(ranks) == 2
    cluster.end("slurmd.n2", signal.SIGKILL)  # alone: what it started knows nothing of it
    wait_for(lambda: run.shown("train")["Restarts"] == "1", 120, "the node to be missed")
    assert all(Path(f"/proc/{pid}").exists() for pid in ranks)
    wait_for(lambda: run.record("train")["tries"] == 2, 120, "the second try")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 120, "the first try's ranks to end")
    steps = losses(run.stage("train"))[-1][0] // 12
    run.wait_for_steps("train", steps + 20)
    cluster.start_node("n2")
    assert "waiting for another rank" in run.log("train")
    assert "crashed: Node failure on n2" in run.log("train")  # of which srun makes exit code 0
    record = run.record("train")
    assert (record["state"], record["tries"], record["nodes"]) == ("running", 2, "n1")
    assert run.shown("train")["Restarts"] == "1"  # the first try did not send the second back
    run.cancel()
    samples = [line[0] for line in losses(run.stage("train"))]
    assert samples == sorted(set(samples))  # one history
    audit = patchmill("shards", "audit", run.stage("train"), cwd=tmp_path)
    assert audit.returncode == 0, audit.stdout


def test_a_job_goes_back_into_the_queue_once_the_controller_answers(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN))
    run.wait_for_steps("train", 60)
    (rank,) = ranks_on(cluster, "n2")
    cluster.end("slurmctld", signal.SIGKILL)
    os.kill(rank, signal.SIGTERM)
    wait_for(lambda: "; tries again" in run.log("train"), 90, "the controller to be missed")
    record = run.record("train")
    assert record["state"] == "failed"  # so far
    assert re.match(r"stopped on request at .* samples, and it cannot go back into the queue: squeue", record["reason"])
    cluster.start_controller()
    wait_for(lambda: run.shown("train")["Restarts"] == "1", 120, "the restart")
    assert run.record("train")["state"] in ("stopped", "running")
    run.wait_for_end()
    assert run.result("train")["samples"] == 700 * 12
    assert run.record("train")["tries"] == 2


def test_a_job_that_cannot_go_back_has_failed(cluster, tmp_path, capsys):
    broken = 'container = ["sh", "-c", "echo error: no such image >&2; exit 1"]'
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), f'sbatch = ["--no-requeue"]\n{broken}')
    run.wait_for_end()
    record = run.record("shards")
    assert (record["state"], record["tries"]) == ("failed", 1)
    told = "crashed: no such image, and it cannot go back into the queue: scontrol says: "
    assert record["reason"].startswith(told)
    assert record["reason"].endswith("; submit the plan again")
    shown = patchmill("status", run.run, "--json", cwd=tmp_path).stdout
    assert json.loads(shown)[0]["state"] == "failed"

    keep_off("4711", ["n1"])
    assert "n1 cannot be excluded, and may be had again: scontrol says: Invalid job id" in capsys.readouterr().err


def test_of_an_array_the_one_that_was_stopped_comes_back_alone(cluster, tmp_path):
    sweep = TRAIN.replace("ranks = 2", 'sweep = { "optim.lr" = [0.001, 0.01] }').replace('"train"', '"rates"')
    best = TRAIN.replace("ranks = 2", 'best = "rates"').replace('"train"', '"final"').replace("700 steps", "20 steps")
    held_out = 'train = "{shards}/train", val = "{shards}/val"'
    parts = [part.replace('train = "{shards}/train"', held_out) for part in (sweep, best)]
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, *parts), "[kind.shards]\nslices = 2")
    assert list(run.jobs) == ["shards.0", "shards.1", "shards", "rates-0", "rates-1", "final"]
    run.wait_for_steps("rates-1", 60)
    cluster.run("scancel", "--signal=TERM", run.jobs["rates-1"])
    run.wait_for_end()
    assert (run.record("rates-0")["tries"], run.record("rates-1")["tries"]) == (1, 2)
    scores = [run.result(f"rates-{number}")["val"]["top1"] for number in (0, 1)]
    rate = [0.001, 0.01][max((0, 1), key=scores.__getitem__)]
    assert f"lr = {rate}" in (run.stage("final") / "resolved.toml").read_text()
    assert run.result("final")["steps"] == 20


def test_the_time_limit_stops_it_and_it_goes_on(cluster, tmp_path):
    endless = TRAIN.replace("700 steps", "1000000 steps")
    profile = 'ranks_per_node = 2\ntime = "3"\ngrace = 30'  # heard 105 to 135 s on
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, endless), profile)
    wait_for(lambda: run.shown("train")["Restarts"] == "1", 300, "the time limit")
    reason = run.record("train")["reason"]
    samples = int(re.fullmatch(r"its time limit came at ([\d,]+) samples", reason)[1].replace(",", ""))
    assert samples == losses(run.stage("train"))[-1][0]  # nothing was lost
    wait_for(lambda: losses(run.stage("train"))[-1][0] > samples, 120, "a step beyond")
    run.cancel()
    assert f"try 2 on {run.record('train')['nodes']}, from {samples:,} samples" in run.log("train")
    assert "TIME LIMIT" not in run.log("train")


def test_a_time_limit_of_which_nothing_warned_is_no_excuse_either(cluster, tmp_path):
    profile = 'time = "1"\nretries = 0\nsetup = ["sleep 32"]\ncontainer = ["sh", "-c", "sleep 300"]'  # warned by then
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), profile)
    run.wait_for_end(240)
    record = run.record("shards")
    assert (record["state"], record["tries"]) == ("failed", 1)
    told = "1 tries came no further than the start; its time limit came at the start; give it more `time`"
    assert record["reason"] == told


@pytest.fixture
def patient(cluster):
    """The cluster, killing what is left of a job as late as Slurm does unless told otherwise: 30 s after its limit."""
    before = cluster.conf.read_text()
    with configured(cluster, before.replace("KillWait=5\n", "")):
        assert "KillWait                = 30 sec" in cluster.run("scontrol", "show", "config")
        yield cluster


@contextmanager
def configured(cluster, text: str) -> Iterator[None]:
    """Have the cluster go by other settings meanwhile."""
    before = cluster.conf.read_text()
    try:
        cluster.conf.write_text(text)
        cluster.run("scontrol", "reconfigure")
        yield
    finally:
        cluster.conf.write_text(before)
        cluster.run("scontrol", "reconfigure")


@contextmanager
def stopped(cluster, node: str) -> Iterator[None]:
    """Have the ranks on a node hang: stopped again and again, for at the time limit Slurm has them continue."""
    ranks = ranks_on(cluster, node)
    assert len(ranks) == 2
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.002):
            for pid in ranks:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).suspend()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_ranks_that_hang_at_the_time_limit_are_left_and_the_job_goes_on_from_its_newest_checkpoint(patient, tmp_path):
    cluster, profile = patient, 'ranks_per_node = 2\ntime = "3"\ngrace = 30'  # heard 105 to 135 s on
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN.replace("700 steps", "300 steps")), profile)
    run.wait_for_steps("train", 60)
    saved = partial(run.stage("train").glob, "checkpoints/*/checkpoint.json")
    wait_for(lambda: any(saved()), 60, "a checkpoint")
    (node,) = run.shown("train")["NodeList"].split(",")
    with stopped(cluster, node):
        assert run.shown("train")["Restarts"] == "0"  # stopped before the time limit came
        wait_for(lambda: run.shown("train")["Restarts"] == "1", 300, "the job to go back into the queue")
    assert "its time is over, and the ranks have not ended: what they did" in run.log("train")
    assert re.search(r"\] its time limit came at [\d,]+ samples: back into the queue", run.log("train"))
    run.wait_for_end()
    assert run.result("train")["samples"] == 300 * 12


@pytest.fixture(
    params=[pytest.param("", marks=pytest.mark.slow), "SlurmctldParameters=preempt_send_user_signal\n"],
    ids=["TERM", "USR2"],
)
def pre_empting(cluster, request):
    """The cluster, pre-empting by one signal or the other."""
    before = cluster.conf.read_text()
    with configured(cluster, before + request.param):
        yield cluster


def test_a_job_of_more_weight_takes_the_nodes_and_gives_them_back(pre_empting, tmp_path):
    cluster, profile = pre_empting, 'partition = "low"\nranks_per_node = 1\ntime = "1:00:00"\nretries = 0'
    run = Submitted(cluster, write_plan(tmp_path, SHARDS, TRAIN), profile)
    run.wait_for_steps("train", 60)
    above = ("--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/above.log", "--wrap=sleep 5")
    cluster.run("sbatch", *above)
    wait_for(lambda: run.shown("train")["Restarts"] == "1", 120, "the job to make room")
    assert run.record("train")["reason"].startswith("stopped on request")
    run.wait_for_end()
    assert run.result("train")["samples"] == 700 * 12
    assert run.record("train")["tries"] == 2


def test_what_never_comes_further_ends_with_the_reason(cluster, tmp_path):
    profile = 'retries = 1\n[stage.shards]\ncontainer = ["sh", "-c", "echo error: no such image >&2; exit 1"]'
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), profile)
    run.wait_for_end()
    record = run.record("shards")
    assert (record["state"], record["tries"]) == ("failed", 2)
    assert record["reason"] == "2 tries came no further than the start; crashed: no such image"
    assert run.shown("shards")["JobState"] == "FAILED"


def test_a_node_that_fails_its_health_check_is_excluded(cluster, tmp_path):
    profile = """health = ["sh", "-c", 'test "$SLURMD_NODENAME" != n1']"""
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), profile)
    run.wait_for_end()
    assert run.result("shards")
    assert run.record("shards")["nodes"] == "n2"
    assert run.shown("shards")["ExcNodeList"] == "n1"
    assert "health check failed on n1: excluded" in run.log("shards")


def commands(cluster) -> list[bytes]:
    """Return what runs on the nodes."""
    found = []
    for pid in (pid for node in cluster.nodes for pid in cluster.tasks(node)):
        with suppress(OSError):
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


SLOW_CHECK = """health = ["sh", "-c", 'test ${SLURM_RESTART_COUNT:-0} != 0 || sleep 100']"""


@pytest.mark.parametrize("options", [["--signal=TERM"], ["--signal=TERM", "--batch"]])
def test_told_to_stop_while_the_health_of_nodes_is_checked_it_comes_back_and_excludes_none(cluster, tmp_path, options):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), SLOW_CHECK)
    wait_for(lambda: b"sleep\x00100\x00" in commands(cluster), 60, "the check to run")
    cluster.run("scancel", *options, run.jobs["shards"])
    run.wait_for_end()
    assert run.result("shards")
    shown, record = run.shown("shards"), run.record("shards")
    assert (shown["Restarts"], shown.get("ExcNodeList", "(null)")) == ("1", "(null)")
    assert (record["tries"], record["barren"]) == (2, 1)
    assert re.search(r"\] stopped on request .*: back into the queue", run.log("shards"))


def test_a_time_limit_that_comes_while_the_health_of_nodes_is_checked_is_no_excuse(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), f'{SLOW_CHECK}\ntime = "3"\ngrace = 100')
    wait_for(lambda: b"sleep\x00100\x00" in commands(cluster), 60, "the check to run")
    cluster.run("scancel", "--signal=USR2", "--batch", run.jobs["shards"])  # as Slurm does before the limit
    run.wait_for_end()
    assert run.result("shards")
    assert (run.record("shards")["tries"], run.record("shards")["barren"]) == (2, 2)
    assert "its time limit came before its ranks were started: back into the queue" in run.log("shards")


def test_cancelled_while_the_health_of_nodes_is_checked_it_is_cancelled(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), SLOW_CHECK)
    wait_for(lambda: b"sleep\x00100\x00" in commands(cluster), 60, "the check to run")
    run.cancel()
    (shown,) = json.loads(patchmill("status", run.run, "--json", cwd=tmp_path).stdout)
    assert shown["state"] == "cancelled"


def test_a_health_check_that_no_node_passes_ends_the_job(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), 'health = ["false"]')
    run.wait_for_end()
    record = run.record("shards")
    assert (record["state"], record["tries"]) == ("failed", 2)
    told = (
        r"health check failed on n[12], and the job cannot do without: sbatch says: .* not available; mend that or `h"
    )
    assert re.match(told, record["reason"])
    assert run.shown("shards")["JobState"] == "FAILED"


SICK = """health = ["sh", "-c", 'sleep 9; test "$SLURMD_NODENAME" != n1']"""


def test_a_node_is_excluded_once_the_controller_answers(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), SICK)
    wait_for(lambda: b"sleep\x009\x00" in commands(cluster), 60, "the check to run")
    cluster.end("slurmctld", signal.SIGTERM)  # by SIGKILL, it could lose a job that it has not saved yet
    wait_for(lambda: not any(b"srun" in each for each in commands(cluster)), 60, "the check to end")
    time.sleep(3)
    cluster.start_controller()
    run.wait_for_end()
    assert run.result("shards")
    assert run.shown("shards")["ExcNodeList"] == "n1"
    assert run.record("shards")["tries"] == 2


def test_a_node_is_excluded_where_no_job_may_be_submitted_from_nodes_and_slurms_words_are_told(cluster, tmp_path):
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), SICK)
    wait_for(lambda: b"sleep\x009\x00" in commands(cluster), 60, "the check to run")
    cluster.run("scontrol", "update", "PartitionName=debug", "AllocNodes=login")
    try:
        told = "health check failed on n1: excluded, although sbatch says: "
        wait_for(lambda: told in run.log("shards"), 60, "the check to fail")
    finally:
        cluster.run("scontrol", "update", "PartitionName=debug", "AllocNodes=ALL")  # here nodes and login are one host
    run.wait_for_end()
    assert run.result("shards")
    assert run.shown("shards")["ExcNodeList"] == "n1"


def test_an_srun_that_fails_before_the_check_is_a_crash_and_no_node_is_excluded(cluster, tmp_path):
    first = """setup = ['test "${SLURM_RESTART_COUNT:-0}" != 0 || export SLURM_GRES=gpu:99']"""
    run = Submitted(cluster, write_plan(tmp_path, SHARDS), f'{first}\nhealth = ["true"]')
    run.wait_for_end()
    assert run.result("shards")
    shown = run.shown("shards")
    assert (shown["Restarts"], shown.get("ExcNodeList", "(null)")) == ("1", "(null)")
    assert re.search(
        r"\] crashed before the health of its nodes was checked: .*: back into the queue", run.log("shards")
    )


def test_of_two_submits_at_once_one_is_refused_and_so_is_a_run_beside_jobs(cluster, tmp_path):
    plan = write_plan(tmp_path, SHARDS, TRAIN)
    (tmp_path / "cluster.toml").write_text('sbatch = ["--begin=now+300"]')
    command = [sys.executable, "-m", "launch.cli", "submit", str(plan), "--cluster", "cluster.toml"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = {process.wait(120): process.stderr.read() for process in both}
    assert sorted(told) == [0, 2]
    assert "are in the queue (shards, train)" in told[2]
    assert len(cluster.run("squeue", "-h").splitlines()) == 2
    run = tmp_path / "runs/tiny"
    plan.write_text(plan.read_text().replace("700 steps", "20 steps"))
    by_hand = refused(patchmill("run", plan, cwd=tmp_path))
    assert by_hand.endswith(f"wait for them, or end them: patchmill cancel {run}")
    assert "700 steps" in (run / "plan.toml").read_text()
    cancelled = patchmill("cancel", run, "--json", cwd=tmp_path).stdout
    assert cancelled == '["shards", "train"]\n'


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ('partition = "none"', "invalid partition specified: none"),
        ('[stage.train]\nconstraint = "; touch hacked"', "Invalid feature specification"),
        ("[stage.trian]", "[stage.trian] of cluster.toml: there is no such stage (did you mean 'train'?)"),
        ("partitions = 1", "unknown setting partitions in cluster.toml (did you mean 'partition'?)"),
        ('account = "a\\nb"', "must be one line of printable characters"),
    ],
)
def test_what_slurm_does_not_take_is_told_and_nothing_is_submitted(cluster, tmp_path, profile, told):
    plan = write_plan(tmp_path, SHARDS, TRAIN)
    (tmp_path / "cluster.toml").write_text(profile)
    done = patchmill("submit", plan, "--cluster", "cluster.toml", cwd=tmp_path)
    assert told in refused(done)
    assert not cluster.run("squeue", "-h")
    assert not list(tmp_path.rglob("hacked"))


def test_of_a_plan_of_which_one_script_cannot_be_written_no_job_is_left(cluster, tmp_path):
    plan = write_plan(tmp_path, SHARDS, TRAIN)
    (tmp_path / "runs/tiny/slurm/train.sbatch").mkdir(parents=True)
    told = refused(patchmill("submit", plan, cwd=tmp_path))
    assert "Is a directory" in told
    assert "; nothing was submitted, and the scripts are in " in told
    assert not cluster.run("squeue", "-h")


def names_below(pid: int) -> list[str]:
    """Return the names of what a process started."""
    found = []
    for each in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            found.append(each.name())
    return found


def test_ctrl_c_however_often_during_a_submit_leaves_no_job_held(cluster, tmp_path):
    plan = write_plan(tmp_path, SHARDS, TRAIN)
    controller = int((cluster.folder / "slurmctld.pid").read_text())
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "submit", str(plan)],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )  # fmt: skip
    os.kill(controller, signal.SIGSTOP)
    try:
        wait_for(lambda: "sbatch" in names_below(process.pid), 60, "sbatch to start")
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        assert process.poll() is None  # the job may be there by now, and has no number yet
    finally:
        os.kill(controller, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.send_signal(signal.SIGINT)  # also while it cancels
        time.sleep(0.001)
    code, stderr = done(process)
    assert code in (130, -signal.SIGINT), stderr  # by the signal itself, where it came after the end
    assert not cluster.run("squeue", "-h")


def test_without_slurm_or_profile(tmp_path):
    plan = write_plan(tmp_path, SHARDS)
    assert "there is no sbatch on this machine" in refused(patchmill("submit", plan, cwd=tmp_path, PATH="/nowhere"))
    assert "there is no settings file" in refused(patchmill("submit", plan, "--cluster", "none.toml", cwd=tmp_path))
