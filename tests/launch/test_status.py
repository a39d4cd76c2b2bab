"""What `patchmill status`, `logs` and `cancel` tell of runs that were never submitted; tests/slurm has the others."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from launch.cluster import Cluster, JobSettings
from launch.plan import Plan, read_plan
from launch.run import RUNNER, begin, finish, note
from launch.slurm import check_idle, submit
from launch.status import Status, print_log, print_status, status_of
from launch.submission import Job, Record, Submission, folder_of, log_of, logs_of, read_submission
from shards.atomic import only_one
from shards.errors import UserError
from tests.command import environment, patchmill, refused, wait_for_steps
from tests.images import build_image_set

PLAN = """
name = "x"
[[stage]]
name = "train"
kind = "supervised"
[stage.set]
duration = "4000 steps"
global_batch = 12
log_every = "10 steps"
checkpoint = { every = "1000 steps" }
data = { train = "set", resolution = 16 }
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }
engine = { kind = "accelerate" }
[[stage]]
name = "rates"
kind = "supervised"
sweep = { "optim.lr" = [0.1, 0.2] }
[stage.set]
duration = "1 step"
global_batch = 12
data = { train = "set", resolution = 16 }
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build_image_set(folder, per_class=8, shard_samples=8)
    (folder / "plan.toml").write_text(PLAN)
    return folder


def status(folder: Path) -> dict[str, Status]:
    return {stage.name: stage for stage in status_of(folder / "runs" / "x")}


def submitted(plan: Plan, **digests: str | None) -> Path:
    """Leave behind what a submission does; the digests are of the stages then. Return the run's folder."""
    folder_of(plan.run).mkdir(parents=True, exist_ok=True)
    (plan.run / "plan.toml").write_text(plan.path.read_text())
    jobs, before = {}, ()
    for number, stage in enumerate(plan.stages):
        name = stage.table.name
        digest = digests.get(name, stage.digest)
        jobs[name] = Job(id=str(number + 1), stage=name, needs=before, digest=digest, settings=JobSettings())
        before = (name,)
    Submission(plan=str(plan.path), name=plan.run.name, smoke=False, known={}, recipes={}, jobs=jobs).write(plan.run)
    return plan.run


@pytest.fixture
def plan(data, tmp_path, monkeypatch) -> Plan:
    """Of stages in a row, where nobody knows the queue."""
    monkeypatch.setenv("PATH", "/nowhere")
    (tmp_path / "plan.toml").write_text(PLAN.replace('train = "set"', f'train = "{data}/set"'))
    return read_plan(tmp_path / "plan.toml", tmp_path / "runs")


def test_what_other_settings_made_does_not_make_a_job_done(plan, tmp_path):
    for stage in plan.stages:
        begin(stage)
        finish(stage, "{}", 1.0)
    submitted(plan, **{"train": "of before", "rates-0": None})  # rates-0: a sweep was to settle it
    Record(plan.run, "train").note("failed", reason="module: nope")
    found = status(tmp_path)
    assert (found["train"].state, found["train"].why) == ("failed", "module: nope")
    assert (found["rates-0"].state, found["rates-0"].why) == ("cancelled", "train failed")
    assert found["rates-1"].state == "done"
    Record(plan.run, "rates-0").note("done", reason=None)
    assert status(tmp_path)["rates-0"].state == "done"


def test_of_a_run_after_a_submission_the_run_is_told_and_not_its_jobs(plan, tmp_path, capsys):
    submitted(plan)
    for name in ("train", "rates-0"):
        log_of(plan.run, name).write_text("said by its job\n")
    Record(plan.run, "train").note("failed", reason="crashed: old", tries=3)
    Record(plan.run, "rates-0").note("done")  # whose folder `--from` set aside
    told = status(tmp_path)["train"]
    assert (told.state, told.why, told.job, told.restarts) == ("failed", "crashed: old", "1", 2)
    train = plan.stages[0]
    begin(train)
    with only_one(train.folder / "logs" / RUNNER, "patchmill run"):
        note(train.folder, "running")
        (train.folder / "logs" / "rank-0.log").write_text("said by its rank\n")
        told = status(tmp_path)["train"]
        assert (told.state, told.why, told.job, told.restarts) == ("running", "", None, 0)
        assert told.log.endswith("train/logs/rank-0.log")
    assert status(tmp_path)["train"].state == "lost"
    assert status(tmp_path)["rates-0"].state == "not begun"
    print_log(plan.run, "train", rank=0, lines=10, follow=False)
    print_log(plan.run, "rates-0", rank=0, lines=10, follow=False)
    assert capsys.readouterr().out == "said by its rank\nsaid by its job\n"
    finish(train, "{}", 1.0)
    assert (status(tmp_path)["train"].state, status(tmp_path)["train"].job) == ("done", None)


def test_beside_ranks_that_are_at_work_nothing_begins_whatever_the_queue_says(plan):
    run = submitted(plan)
    check_idle(run)
    Record(run, "train").note("running", nodes="n[1-2]")
    with only_one(logs_of(run, read_submission(run).jobs["train"]), "rank", shared=True):
        told = (
            f"ranks of {run} are at work (train on n[1-2]), although no queue here has their jobs; wait for them, or "
            f"end them: patchmill cancel {run} where they were submitted, or kill them there"
        )
        with pytest.raises(UserError, match=re.escape(told)):
            check_idle(run)
        note(plan.stages[0].folder, "running")  # they are of a `patchmill run`, which waits for those of one before
        check_idle(run)
    check_idle(run)


def test_what_a_sweep_has_no_more_is_set_aside_when_it_is_submitted(plan, tmp_path, monkeypatch):
    for stage in plan.stages:
        begin(stage)
        finish(stage, "{}", 1.0)
        Record(submitted(plan), stage.table.name).note("done")
    assert list(status(tmp_path)) == ["train", "rates-0", "rates-1"]
    plan.path.write_text(plan.path.read_text().replace("[0.1, 0.2]", "[0.1]"))
    (tmp_path / "sbatch").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(read_plan(plan.path, plan.run.parent), Cluster(None)) == {}  # all that is left is done
    assert list(status(tmp_path)) == ["train", "rates-0"]
    assert [path.name for path in (plan.run / "stages").glob("rates-1*")] == ["rates-1.before-1"]


def watching(run: Path) -> threading.Thread:
    thread = threading.Thread(target=print_status, args=[run, True], daemon=True)
    thread.start()
    return thread


def test_a_watch_goes_on_while_jobs_come_back_and_ends_when_none_does(plan, monkeypatch):
    monkeypatch.setattr("launch.status.SECONDS", 0.1)
    record = Record(submitted(plan), "train")
    record.note("stopped")
    thread = watching(plan.run)
    thread.join(2)
    assert thread.is_alive()
    record.note("failed", reason="crashed")
    thread.join(30)  # although nobody here knows the queue
    assert not thread.is_alive()
    told = {stage.name: (stage.state, stage.why) for stage in status_of(plan.run)}
    assert told == {
        "train": ("failed", "crashed"), "rates-0": ("cancelled", "train failed"),
        "rates-1": ("cancelled", "rates-0 cancelled"),
    }  # fmt: skip


@contextlib.contextmanager
def watched_until(run: Path, word: str) -> Iterator[tuple[threading.Thread, io.StringIO]]:
    """Watch a run until its table has a word; capsys would lose what the thread writes while it is read."""
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        thread = watching(run)
        while word not in shown.getvalue():
            assert thread.is_alive()
            time.sleep(0.02)
        yield thread, shown


@pytest.mark.long
def test_a_watch_does_not_end_between_two_stages_of_a_run(plan, monkeypatch):
    monkeypatch.setattr("launch.status.SECONDS", 2.0)
    plan.run.mkdir(parents=True)
    (plan.run / "plan.toml").write_text(plan.path.read_text())
    stage = plan.stages[0]
    with watched_until(plan.run, "not begun") as (thread, _):
        begin(stage)
        with only_one(stage.folder / "logs" / RUNNER, "patchmill run"):
            note(stage.folder, "running")
            thread.join(6)
            assert thread.is_alive()
        thread.join(30)
        assert not thread.is_alive()


def test_the_last_table_of_a_watch_has_what_was_done_between_two_looks(plan, monkeypatch):
    monkeypatch.setattr("launch.status.SECONDS", 3.0)
    stage = plan.stages[0]
    begin(stage)
    finish(stage, "{}", 1.0)
    done = stage.folder.rename(plan.run / "done")
    (plan.run / "plan.toml").write_text(plan.path.read_text())
    with watched_until(plan.run, "rates-1") as (thread, shown):
        done.rename(stage.folder)
        thread.join(30)
        assert not thread.is_alive()
    assert re.findall(r"^train +(\w+)", shown.getvalue(), re.MULTILINE) == ["not", "done"]  # and none twice


@pytest.mark.long
def test_a_run_is_followed_stopped_and_killed(data, capsys):
    command = [sys.executable, "-m", "launch.cli", "run", "plan.toml", "--only", "train"]
    train = data / "runs/x/stages/train"

    def started(steps: int) -> subprocess.Popen:
        process = subprocess.Popen(command, cwd=data, stderr=subprocess.PIPE, text=True, env=environment())
        wait_for_steps(train, process, steps)
        return process

    process = started(3)
    told = json.loads(patchmill("status", "runs/x", "--json", cwd=data).stdout)
    assert [each["name"] for each in told] == ["train", "rates-0", "rates-1"]
    assert [each["state"] for each in told] == ["running", "not begun", "not begun"]
    assert told[0]["step"] >= 30
    assert told[0]["seconds_left"] > 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    told = status(data)["train"]
    assert (told.state, told.seconds_left) == ("stopped", None)
    assert told.why.startswith("stopped on request at ")
    assert told.log.endswith("train/logs/rank-0.log")
    print_log(data / "runs/x", "train", rank=0, lines=10, follow=False)
    assert "error: stopped on request at " in capsys.readouterr().out
    assert "stopped on request at " in process.stderr.read()  # on the terminal, too

    steps = told.step // 10
    process = started(steps + 3)
    process.kill()
    deadline = time.monotonic() + 60
    while (told := status(data)["train"]).state == "running":
        assert time.monotonic() < deadline
    assert (told.state, told.why) == ("lost", "its process is gone without a word: killed, or its machine was")
    process.wait()


@pytest.mark.long
def test_a_stage_that_failed_says_why(data, tmp_path, capsys):
    (tmp_path / "plan.toml").write_text(PLAN.replace('train = "set"', f'train = "{data}/set"'))
    plan = read_plan(tmp_path / "plan.toml", tmp_path / "runs")
    begin(plan.stages[0])  # as if of a checkpoint that is broken since
    (plan.stages[0].folder / "checkpoints" / "samples-000000000012").mkdir(parents=True)
    (plan.run / "plan.toml").write_text(plan.path.read_text())
    assert status(tmp_path)["train"].state == "begun"
    ended = patchmill("run", "plan.toml", "--only", "train", cwd=tmp_path)
    assert ended.returncode == 2
    told = status(tmp_path)["train"]
    assert told.state == "failed"
    assert told.why.startswith("none of the checkpoints of this run is whole: ")
    print_status(plan.run)
    assert re.search(r"train +failed +none of the checkpoints", capsys.readouterr().out)
    finish(plan.stages[0], '{"samples": 12}', 1.0)
    assert (status(tmp_path)["train"].state, status(tmp_path)["train"].why) == ("done", "")


@pytest.mark.long
def test_on_a_terminal_a_rank_draws_and_its_log_has_the_rest(data, tmp_path):
    """Of a terminal that this test opens, as a user's: bars, and no part of them in the log."""
    bad = PLAN.replace('train = "set"', f'train = "{data}/set"').replace("4000 steps", "200 steps")
    (tmp_path / "plan.toml").write_text(bad)
    command = [sys.executable, "-m", "launch.cli", "run", "plan.toml", "--only", "train"]
    ours, theirs = os.openpty()
    process = subprocess.Popen(command, cwd=tmp_path, stderr=theirs, env=environment(TERM="xterm", COLUMNS="100"))
    os.close(theirs)
    wait_for_steps(tmp_path / "runs/x/stages/train", process, 3)
    process.send_signal(signal.SIGTERM)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal ends
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(60) == 75
    assert b"images/s" in shown
    assert b"\x1b[" in shown
    told = status(tmp_path)["train"]
    assert told.why.startswith("stopped on request at ")
    assert told.why.encode() in shown
    log = Path(tmp_path / "runs/x/stages/train/logs/rank-0.log").read_text()
    assert "\x1b" not in log
    assert f"error: {told.why}\n" in log


def test_what_was_never_submitted_cannot_be_cancelled(data, tmp_path):
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "plan.toml").write_text(PLAN)
    assert refused(patchmill("cancel", run, cwd=tmp_path)) == (
        f"error: no job of {run} is known: it was never submitted; stop its `patchmill run` by Ctrl-C or SIGTERM"
    )
    assert [stage.state for stage in status_of(run)] == ["not begun"] * 3
    with pytest.raises(UserError, match=r"train/logs/rank-0\.log yet; nothing else is there"):
        print_log(run, "train", rank=0, lines=10, follow=False)


def test_without_slurm_nothing_is_cancelled(plan, tmp_path):
    run = submitted(plan)
    told = refused(patchmill("cancel", run, cwd=tmp_path))
    assert told == "error: there is no scancel on this machine; cancel from a login node"


def test_the_logs_that_are_there_are_named(tmp_path, capsys):
    run = tmp_path / "runs" / "x"
    logs = run / "stages/train/logs"
    logs.mkdir(parents=True)
    (logs / "rank-1.log").write_text("hello\n")
    (run / "plan.toml").write_text(PLAN)
    with pytest.raises(UserError, match=rf"rank-0\.log yet; {logs}/rank-1\.log"):
        print_log(run, "train", rank=0, lines=10, follow=False)
    print_log(run, "train", rank=1, lines=10, follow=False)
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        ("result.json", '{"digest": "x", "resu', "result.json is damaged"),
        ("result.json", "[1]", "result.json is damaged (a list, and no table)"),
        ("state.json", '{"state": ["running"]}', "tells what no run does"),
        (
            "metrics.jsonl",
            '{"samples": 1, "step": 1}\n',
            "/train tells what no run does (KeyError: 'ima",
        ),
        ("../../slurm/submission.json", '{"jobs', "end those named x:... by scancel, then remove it"),
    ],
)
@pytest.mark.long
def test_damaged_files_of_a_run_are_one_line(file, text, told, plan, tmp_path):
    begin(plan.stages[0])
    (plan.run / "plan.toml").write_text(plan.path.read_text())
    folder = plan.stages[0].folder
    (folder / "resolved.toml").write_text('duration = "4 steps"\nglobal_batch = 12\n')
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    done = patchmill("status", plan.run, cwd=tmp_path)
    assert told in refused(done)


@pytest.mark.long
@pytest.mark.parametrize("interrupted", [False, True])
def test_what_a_stage_says_is_followed_until_it_ends_or_somebody_has_seen_enough(interrupted, plan, tmp_path):
    train = plan.stages[0]
    begin(train)
    (plan.run / "plan.toml").write_text(plan.path.read_text())
    log = train.folder / "logs" / "rank-0.log"
    with ExitStack() as running:
        running.enter_context(only_one(train.folder / "logs" / RUNNER, "patchmill run"))
        note(train.folder, "running")
        log.write_text("one\ntwo\nthree\n")
        command = [sys.executable, "-m", "launch.cli", "logs", "train", "--lines", "2", "--follow"]
        follower = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert [follower.stdout.readline() for _ in range(2)] == ["two\n", "three\n"]
            for word in ("four\n", "five\n"):
                with open(log, "a") as file:
                    file.write(word)
                assert follower.stdout.readline() == word  # while the stage goes on
            if interrupted:
                follower.send_signal(signal.SIGINT)
            else:
                with open(log, "a") as file:
                    file.write("last\n")
                running.close()
                finish(train, "{}", 1.0)
            rest, stderr = follower.communicate(timeout=60)
        finally:
            follower.kill()
    assert (follower.returncode, rest) == ((130, "") if interrupted else (0, "last\n"))
    assert stderr == f"==> {log.relative_to(tmp_path)}\n"
