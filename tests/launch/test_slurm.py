"""Scripts and profiles, without a cluster; tests/slurm has one."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import Cluster, JobSettings, layout
from launch.job import Progress
from launch.plan import read_plan
from launch.requeue import _seconds
from launch.run import begin
from launch.slurm import CODE, _nothing_heard, _numbers, _parts, _script, _settings, overruling, slurm
from launch.snapshot import take_snapshot
from launch.stages import KINDS
from launch.submission import Job, Record, Submission, folder_of, keep_plan, log_of, read_submitted_plan
from pipeline import provenance
from shards.errors import UserError
from tests.command import ROOT, patchmill
from tests.images import build_image_set
from tests.plans import SHARDS, converting, training, write_plan

RATES = 'ranks = 16\nsweep = { "optim.lr" = [0.1, 0.2, 0.3] }'
PLAN = 'name = "x"' + SHARDS
PLAN += training("rates", head=RATES, data='train = "{shards}", val = "{shards}"')  # whose best is copied
PLAN += converting("rates", name="copy")


def plan_of(folder: Path):
    return read_plan(write_plan(folder, PLAN), folder / "runs")


def scripts(plan, profile: str) -> dict[str, str]:
    (plan.path.parent / "cluster.toml").write_text(profile)
    cluster = Cluster(plan.path.parent / "cluster.toml")
    return {part.name: _script(plan, part, _settings(part, cluster)) for part in _parts(plan, cluster)}


def submission_of(plan, **more) -> Submission:
    table = {"plan": str(plan.path), "name": plan.run.name, "smoke": False, "known": plan.inputs.known}
    return Submission(**table | {"recipes": {}, "jobs": {}} | more)


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def test_a_script_a_stage_with_what_the_profile_says_of_it(tmp_path):
    profile = """
        partition = "gpu"
        gpus_per_node = 8
        time = "1-0"
        sbatch = ["--exclusive"]
        modules = ["cuda/12.4"]
        setup = ["ulimit -n 4096"]
        [kind.shards]
        partition = "cpu"
        slices = 4
        [stage.rates]
        time = "3-0"
    """
    found = scripts(plan_of(tmp_path), profile)
    assert list(found) == ["shards.slices", "shards", "rates", "copy"]
    rates = options(found["rates"])
    told = "nodes=2 ntasks-per-node=8 gpus-per-node=8 array=0,1,2 time=3-0 exclusive partition=gpu requeue"
    assert {f"--{option}" for option in told.split()} <= set(rates)
    assert {"--open-mode=append", "--signal=B:USR2@120"} <= set(rates)
    assert f"--output={tmp_path}/runs/x/slurm/rates-%a.log" in rates
    assert found["rates"].startswith("#!/bin/bash -l\n")  # `module` is a function of login shells
    load = "module load cuda/12.4 || { echo 'error: module load cuda/12.4 failed' >&2; exit 2; }"
    assert f"\n{load}\nulimit -n 4096\n" in found["rates"]
    assert found["rates"].endswith(f"-P -m launch.job {tmp_path}/runs/x rates-$SLURM_ARRAY_TASK_ID\n")
    assert "--gpus-per-node=1" in options(found["copy"])  # one rank
    assert {"--partition=cpu", "--array=0-3", "--time=1-0"} <= set(options(found["shards.slices"]))
    assert found["shards.slices"].endswith(" shards.$SLURM_ARRAY_TASK_ID\n")


@pytest.mark.parametrize(
    ("profile", "copy", "rates"),
    [  # of one rank, and of 16
        ('gpus_per_node = 8\nmemory = "480G"', "60G", "480G"),
        ('gpus_per_node = 8\nranks_per_node = 4\nmemory = "100g"', "25G", "100G"),
        ('ranks_per_node = 16\nmemory = "1T"', "64G", "1T"),
        ('ranks_per_node = 8\nmemory = "100G"', "12800M", "100G"),
        ('ranks_per_node = 8\nmemory = "4096"', "512M", "4096M"),
        ('gpus_per_node = 8\nmemory = "480G"\n[stage.copy]\nranks_per_node = 1', "480G", "480G"),
        ('memory = "480G"', "480G", "480G"),  # nobody says how much of a node that is
        ('gpus_per_node = 8\nmemory = "0"', "0", "0"),  # all that a node has
        ('gpus_per_node = 8\nmemory = "lots"', "lots", "lots"),  # which sbatch refuses
    ],
)
def test_a_job_asks_for_as_large_a_part_of_a_nodes_memory_as_of_its_ranks(tmp_path, profile, copy, rates):
    found = scripts(plan_of(tmp_path), profile)
    assert f"--mem={copy}" in options(found["copy"])
    assert f"--mem={rates}" in options(found["rates"])


def test_no_variable_of_sbatch_goes_before_what_a_script_says(tmp_path):
    profile = 'account = "vision"\ntime = "1-0"\nmemory = "8G"\nsbatch = ["--reservation=x"]'
    found = overruling(scripts(plan_of(tmp_path), profile)["rates"])
    said = "JOB_NAME OUTPUT OPEN_MODE ARRAY_INX MEM_PER_NODE TIMELIMIT SIGNAL ACCOUNT NO_REQUEUE RESERVATION ERROR WAIT"
    assert found >= {f"SBATCH_{name}" for name in said.split()}
    assert "SBATCH_CLUSTERS" in found  # jobs of another would be looked for on this one
    assert not found & {"SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_CONSTRAINT"}  # of which it says nothing
    assert overruling("#SBATCH -p gpu -A x\n#SBATCH --exclusive --qos=y\n") - overruling("") == {
        f"SBATCH_{name}" for name in ("PARTITION", "ACCOUNT", "EXCLUSIVE", "QOS")
    }


@pytest.mark.parametrize(
    "text", ["a b", "it's", '"', "$(touch hacked)", "`touch hacked`", "; touch hacked #", "& x", "\\"]
)
def test_no_setting_and_no_path_is_read_by_the_shell(tmp_path, text):
    folder = tmp_path / text.replace("/", "") if text != "\\" else tmp_path
    profile = f"env = {{ VALUE = {json.dumps(text)} }}\nmodules = [{json.dumps(text)}]\naccount = {json.dumps(text)}"
    script = scripts(plan_of(folder), profile)["shards"]
    # The same script, with what it would start in place of the program that starts it.
    shown = 'printf "%s\\0" "$VALUE" "$PYTHONPATH" '
    script = script.replace("exec ", shown).replace("#!/bin/bash -l", 'module() { printf "%s\\0" "$2"; }')
    bare = {"PATH": os.environ["PATH"]}
    said = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=bare, capture_output=True, text=True, check=True
    ).stdout
    run = str(folder / "runs" / "x")
    assert said.split("\0")[:-1] == [
        text, text, f"{run}/slurm/{CODE}", sys.executable, "-P", "-m", "launch.job", run, "shards"
    ]  # fmt: skip
    assert not list(tmp_path.rglob("hacked"))
    account = next(option for option in options(script) if option.startswith("--account="))
    assert re.sub(r"\\(.)", r"\1", account.removeprefix("--account=")[1:-1]) == text


def test_a_folder_that_python_cannot_find_code_in_is_refused(tmp_path):
    """A colon parts the folders of PYTHONPATH."""
    with pytest.raises(UserError, match=r"cannot run the code below '.*a:b/runs/x/slurm', for its colon; choose"):
        scripts(plan_of(tmp_path / "a:b"), "")


def test_a_folder_that_slurm_cannot_write_logs_to_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"choose another --runs"):
        scripts(plan_of(tmp_path / "back\\slash"), "")


def test_ranks_must_fill_nodes():
    assert layout(1, JobSettings(gpus_per_node=8), "x") == (1, 1)
    assert layout(4, JobSettings(), "x") == (1, 4)
    assert layout(16, JobSettings(gpus_per_node=8), "x") == (2, 8)
    assert layout(16, JobSettings(gpus_per_node=8, ranks_per_node=4), "x") == (4, 4)
    with pytest.raises(UserError, match="stage x has 12 ranks, and a node takes 8; make ranks a multiple"):
        layout(12, JobSettings(gpus_per_node=8), "x")


@pytest.mark.parametrize(
    ("profile", "told"),
    [
        ("partitions = 1", r"unknown setting partitions in .*did you mean 'partition'"),
        ("[kind.shard]", r"there is no such kind \(did you mean 'shards'\?\)"),
        ("[stage.x]\ntimes = 1", r"unknown setting times in \[stage.x\] of .*did you mean 'time'"),
        ('sbatch = ["-J", "x"]', "'-J' names the job, and Patchmill knows its jobs by their names; leave it out"),
        ('sbatch = ["--job-name=x"]', "'--job-name=x' names the job"),
        ('sbatch = ["--exclusive --job=x"]', "'--exclusive --job=x' names the job"),
        *(
            (f'sbatch = ["{option}"]', f"'{option}' {told}.*; leave it out$")
            for option, told in {
                "--output=all.log": "moves what a job says, and `patchmill status` and `logs` read that",
                "-o all.log": "moves what",
                "-oall.log": "moves what",
                "--error all.log": "moves what",
                "--exclusive -e all.log": "moves what",
                "--array=0-3": "makes an array of the job, and Patchmill has its own",
                "-a 0-3": "makes an array",
                "--clusters=other": "submits to another cluster",
                "-M other": "submits to another cluster",
                "--signal=USR1@60": "takes the warning before the time limit away, .*; `grace` says how long before",
            }.items()
        ),
        ('srun = ["--output=rank.log"]', "'--output=rank.log' moves what a job says"),
        ('qos = "a\\nb"', "must be one line of printable characters"),
        ('env = { "A B" = "1" }', "is no name of an environment variable"),
    ],
)
def test_what_is_wrong_in_a_profile_is_told(tmp_path, profile, told):
    (tmp_path / "cluster.toml").write_text(profile)
    with pytest.raises(UserError, match=told):
        Cluster(tmp_path / "cluster.toml").check_names(list(KINDS), ["x"])


def test_other_options_of_sbatch_are_taken_as_they_are(tmp_path):
    taken = ["--exclusive", "--exclude=n1", "--export=NONE", "--account=x", "-A x", "--reservation=-o", "--comment=j-e"]
    (tmp_path / "cluster.toml").write_text(f'sbatch = {json.dumps(taken)}\nsrun = ["--signal=USR1", "-J", "x"]')
    settings = Cluster(tmp_path / "cluster.toml").job("shards", "x")
    assert (settings.sbatch, settings.srun) == (taken, ["--signal=USR1", "-J", "x"])


def test_the_profile_of_the_docs_fits_and_every_key_is_told():
    page = (ROOT / "docs" / "cluster.md").read_text()
    shown = tomllib.loads(re.search(r"```toml\n(partition = .*?)```", page, re.DOTALL)[1])
    for table in (shown, *shown["kind"].values(), *shown["stage"].values()):
        JobSettings.model_validate({key: value for key, value in table.items() if key not in ("kind", "stage")})
    rows = " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", rows)) >= JobSettings.model_fields.keys()


def test_an_array_is_waited_for_by_its_number_if_all_of_it_is():
    jobs = {
        name: Job(id=number, stage=name, settings=JobSettings())
        for name, number in {"a": "1", "b-0": "2_0", "b-1": "2_1", "c-0": "3_0", "c-1": "3_1"}.items()
    }
    assert _numbers(jobs, ["a", "b-0", "b-1", "c-1"]) == ["1", "2", "3_1"]
    assert _numbers(jobs) == ["1", "2", "3"]


def test_no_variable_of_its_users_shell_changes_what_slurms_commands_show_and_end(monkeypatch):
    for name in ("SQUEUE_STATES", "SQUEUE_PARTITION", "SCANCEL_STATE", "SCONTROL_ALL", "SLURM_CLUSTERS"):
        monkeypatch.setenv(name, "x")
    for name in ("SLURM_CONF", "SBATCH_PARTITION"):  # which says where it is; and what a profile leaves open
        monkeypatch.setenv(name, "y")
    told = slurm("env").splitlines()
    assert {"SLURM_CONF=y", "SBATCH_PARTITION=y"} <= set(told)
    assert not [line for line in told if line.endswith("=x")]


def test_a_time_limit_is_read_as_slurm_writes_it():
    told = {"45": 45, "2:00": 120, "1:00:00": 3600, "3-00:00:30": 3 * 86400 + 30, "UNLIMITED": float("inf")}
    assert {text: _seconds(text) for text in told} == told
    with pytest.raises(ValueError, match="NOT_SET"):
        _seconds("NOT_SET")


def test_tries_that_come_no_further_are_counted(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    folder_of(tmp_path).mkdir()
    assert [Record(tmp_path, "x").begin(samples) for samples in (0, 0, 8, 8, 8, 9)] == [1, 2, 1, 2, 3, 1]
    record = Record(tmp_path, "x")
    record.excuse("stopped", "asked")
    assert Record(tmp_path, "x").begin(9) == 1  # the one before was no fault of its own
    assert Record(tmp_path, "x").table["tries"] == 7


def test_jobs_go_by_the_plan_that_was_submitted_whatever_is_run_in_its_folder_since(tmp_path):
    plan = plan_of(tmp_path)
    folder_of(plan.run).mkdir(parents=True)
    (folder_of(plan.run) / "plan.toml").write_text(PLAN)
    (plan.run / "plan.toml").write_text(PLAN.replace("1 epoch", "2 epochs"))  # `patchmill run` leaves it there
    submission_of(plan).write(plan.run)
    submitted = read_submitted_plan(plan.run)
    assert [stage.digest for stage in submitted.stages] == [stage.digest for stage in plan.stages]


def test_whatever_ends_a_job_is_told(tmp_path):
    plan = plan_of(tmp_path)
    job = Job(id="1", stage="shards", settings=JobSettings())
    submission_of(plan, jobs={"shards": job}).write(plan.run)  # and no plan
    done = subprocess.run(
        [sys.executable, "-m", "launch.job", plan.run, "shards"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr  # for the log: it is no user's mistake
    record = Record(plan.run, "shards").table
    assert record["state"] == "failed"
    assert record["reason"].startswith("FileNotFoundError: [Errno 2] No such file or directory: '")


def test_a_job_that_comes_back_too_often_fails_with_what_was_the_matter_the_last_time(tmp_path):
    plan = plan_of(tmp_path)
    job = Job(id="1", stage="shards", settings=JobSettings())
    submission_of(plan, jobs={"shards": job}).write(plan.run)
    (folder_of(plan.run) / "plan.toml").write_text(PLAN)
    Record(plan.run, "shards").note("stopped", tries=4, barren=4, at=0, reason="health check failed on n1: excluded")
    (command,) = re.findall(r"^echo .*begun", scripts(plan, "")["shards"], re.MULTILINE)
    subprocess.run(["bash", "-c", command], check=True)
    command = [sys.executable, "-m", "launch.job", plan.run, "shards"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "SLURM_JOB_NODELIST": "n2"}, check=False)
    assert done.returncode == 1
    record = Record(plan.run, "shards").table
    told = "4 tries in a row came no further than the start; the last: health check failed on n1: excluded"
    assert (record["state"], record["reason"]) == ("failed", told)


def test_a_try_that_is_not_the_last_any_more_writes_nothing(tmp_path, monkeypatch):
    folder_of(tmp_path).mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    lost = Record(tmp_path, "x")
    lost.begin(0)
    lost.note("running", reason="so far")
    assert not lost.is_superseded()
    later = Record(tmp_path, "x")
    later.begin(0)
    assert lost.is_superseded()
    lost.note("failed")
    lost.excuse("stopped", "asked")
    assert Record(tmp_path, "x").table == later.table
    assert later.table["state"] == "running"

    later.path.unlink()  # submitted again
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    Record(tmp_path, "x").begin(0)
    Record(tmp_path, "x").begin(0)
    assert later.is_superseded()


def test_a_try_whose_script_alone_has_begun_is_starting_and_its_words_are_told_not_those_of_the_try_before(tmp_path):
    plan = plan_of(tmp_path)
    text = next(iter(scripts(plan, "").values()))
    name = plan.stages[0].table.name
    folder_of(plan.run).mkdir(parents=True, exist_ok=True)
    log = log_of(plan.run, name)
    log.write_text("[2026] shards: stopped on request at the start\n")
    (command,) = re.findall(r"^echo .*begun", text, re.MULTILINE)
    subprocess.run(["bash", "-c", command], check=True)
    told = Record(plan.run, name).table
    assert (told["state"], told["reason"]) == ("starting", "in its script, before launch.job")
    with open(log, "a") as file:
        file.write("module: nope\n\n")
    assert Record(plan.run, name).table["reason"] == "in its script, before launch.job: module: nope"
    Record(plan.run, name).begin(0)
    assert Record(plan.run, name).table["state"] == "running"


def test_a_try_that_was_put_back_by_another_is_superseded_as_soon_as_the_script_of_the_next_begins(
    tmp_path, monkeypatch
):
    plan = plan_of(tmp_path)
    name = plan.stages[0].table.name
    (command,) = re.findall(r"^echo .*begun", next(iter(scripts(plan, "").values())), re.MULTILINE)
    folder_of(plan.run).mkdir(parents=True, exist_ok=True)
    begin = ["bash", "-c", command]
    subprocess.run(begin, check=True)  # and no log is there
    lost = Record(plan.run, name)
    assert not lost.is_superseded()
    lost.begin(0)
    subprocess.run(begin, check=True, env={**os.environ, "SLURM_RESTART_COUNT": "1"})
    assert lost.is_superseded()
    lost.note("crashed", reason="lost its peers")
    assert Record(plan.run, name).table["state"] == "starting"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not Record(plan.run, name).is_superseded()


def test_what_is_there_of_other_settings_is_no_progress(tmp_path):
    plan = plan_of(tmp_path)
    stage = plan.stages[0]
    begin(stage)
    assert patchmill(*stage.arguments, cwd=tmp_path).returncode == 0
    assert str(Progress(stage, None)) != "the start"
    changed = replace(stage, inputs="others")
    assert str(Progress(changed, None)) == "the start"


@pytest.mark.parametrize("edited", ["optim.lr = 0.2", "sweep = 3", "broken [", None])
def test_jobs_go_by_the_recipes_that_were_submitted_whatever_is_edited_since(tmp_path, edited):
    """Paths in them still count from the plan's folder."""
    paths = [tmp_path / "own.toml", tmp_path / "more" / "own.toml"]
    paths[1].parent.mkdir()
    paths[0].write_text('optim.lr = 0.1\ndata.val = "set"\n[sweep]\nseed = [0, 1]\n')
    paths[1].write_text("optim.lr = 0.3\n")
    build_image_set(tmp_path, per_class=2)
    text = 'name = "x"' + SHARDS + training("first", head='recipe = "own.toml"\nsweep = "recipe"')
    text += training("second", head='recipe = "more/own.toml"\nbest = "first"')
    (tmp_path / "plan.toml").write_text(text)
    plan = read_plan(tmp_path / "plan.toml", tmp_path / "runs")
    submission_of(plan, recipes=keep_plan(plan)).write(plan.run)
    (plan.run / "plan.toml").write_text(text)
    for path in paths:
        path.write_text(edited) if edited else path.unlink()
    submitted = read_submitted_plan(plan.run)
    assert [stage.digest for stage in submitted.stages] == [stage.digest for stage in plan.stages]
    assert [stage.settings for stage in submitted.stages] == [stage.settings for stage in plan.stages]
    assert [stage.settings.optim.lr for stage in submitted.stages[1:]] == [0.1, 0.1, 0.3]
    assert submitted.stages[1].settings.data.val == str(tmp_path / "set")


def test_a_snapshot_is_whole_and_says_its_commit(tmp_path):
    (tmp_path / CODE).mkdir()
    (tmp_path / CODE / "of before").touch()
    take_snapshot(tmp_path / CODE)
    assert {path.name for path in (tmp_path / CODE).iterdir()} == {"launch", "pipeline", "shards", provenance.SNAPSHOT}
    code = "from pipeline import provenance; print(provenance.__file__, provenance.commit())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / CODE)}
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path / CODE / "pipeline/provenance.py"), str(provenance.commit())]


def test_a_submitted_plan_does_not_look_at_its_images_again(tmp_path):
    from launch.plan import read_submitted

    plan = plan_of(tmp_path)
    (tmp_path / "images").rename(tmp_path / "gone")
    (tmp_path / "plan.toml").unlink()
    with pytest.raises(UserError, match="is no run: it holds no plan"):
        read_submitted_plan(plan.run)
    (plan.run / "slurm").mkdir(parents=True)
    (plan.run / "plan.toml").write_text(PLAN)
    with pytest.raises(UserError, match="was never submitted; give the file of its plan"):
        read_submitted_plan(plan.run)
    again = read_submitted(PLAN, plan.path, plan.run, False, plan.inputs.known, {})
    assert [stage.digest for stage in again.stages] == [stage.digest for stage in plan.stages]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("threads", [0, 4])  # any of which may be the one that takes a signal of the process
def test_what_interrupts_a_submit_waits_until_the_number_of_a_job_is_known(threads, number):
    over, known = threading.Event(), []

    def submit():
        with _nothing_heard():
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # for a thread to take it
            known.append("its number")

    before = signal.signal(number, signal.default_int_handler)
    try:
        for _ in range(threads):
            threading.Thread(target=over.wait).start()
        with pytest.raises(KeyboardInterrupt):
            submit()
        assert known == ["its number"]
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
        over.set()
