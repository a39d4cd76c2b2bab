"""What each launcher would start, and what is refused; tests/integration/test_launchers.py starts them."""

import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch import deepspeed
from launch.driver import drive
from launch.lastwords import LastWords
from launch.launchers import Launch, print_commands
from launch.plan import read_plan
from launch.rank import ENDED, code_of_ranks, original, plain, threads, who
from launch.start import Start
from shards.errors import UserError
from tests.command import ROOT
from tests.plans import SHARDS, converting, training, write_plan

PLAN = 'name = "x"' + SHARDS + training("train", head="ranks = 4")
PLAN += training("tune", "finetune", 'init = "train"') + converting("train")
ODD = """it's "my" $(touch hacked) `x` ; # %h & 100=plan"""


@pytest.fixture
def plan(tmp_path):
    return write_plan(tmp_path, PLAN)


def ranks_of(plan, **settings) -> dict[str, int]:
    return {stage.table.name: stage.table.ranks for stage in read_plan(plan, plan.parent / "runs", **settings).stages}


def printed(plan, launch: Launch, capsys, **settings) -> dict[str, list[str]]:
    checked = read_plan(plan, plan.parent / "runs", **settings)
    launch.check(checked.stages)
    print_commands(launch, checked, {stage.table.name for stage in checked.stages})
    lines = capsys.readouterr().out.splitlines()[1:]
    return {title.removeprefix("# "): shlex.split(line) for title, line in zip(lines[::2], lines[1::2], strict=True)}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),  # torchrun
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, (5, 8, 1, 4)),  # deepspeed
        (
            {
                "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0",
            },
            (3, 4, 1, 2),
        ),  # mpirun, in a job of Slurm
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "2"}, (2, 4, 0, 2)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}, (2, 4, 2, 1)),
        (
            {
                "SLURM_PROCID": "6", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
                "SLURM_STEP_TASKS_PER_NODE": "3(x2),2", "SLURM_TASKS_PER_NODE": "64(x4)",
            },
            (6, 8, 0, 2),
        ),  # plain srun -n 8
    ],
)  # fmt: skip
def test_a_rank_knows_itself_by_what_its_launcher_sets(variables, expected):
    assert who(variables) == expected


@pytest.mark.parametrize(
    ("variables", "bound", "here", "expected"),
    [
        ({}, 64, 4, 16),
        ({}, 2, 4, 1),
        ({"SLURM_CPUS_ON_NODE": "32"}, 64, 4, 8),  # srun -n 4 of half a node, its tasks bound to no cores
        ({"SLURM_CPUS_ON_NODE": "32"}, 8, 4, 8),  # bound to its own
        ({"SLURM_CPUS_ON_NODE": "32", "SLURM_CPUS_PER_TASK": "6"}, 64, 4, 6),
        ({"SLURM_CPUS_ON_NODE": "2"}, 64, 4, 1),
        ({"SLURM_CPUS_ON_NODE": "32", "RANK": "0"}, 16, 4, 4),  # torchrun, in a task of Slurm with 16 cores
    ],
)
def test_ranks_share_the_cores_that_are_theirs(variables, bound, here, expected):
    assert threads(variables, bound, here) == expected


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def test_any_word_goes_through_what_quotes_nothing(word):
    assert original(plain(word)) == word
    assert not set(plain(word)) & set(" \t\n'\"$`\\;&|<>(){}[]*?!#~%^")


def test_ranks_are_the_plans_or_those_asked_for_or_one_a_gpu(plan):
    assert ranks_of(plan) == {"shards": 1, "train": 4, "tune": 1, "convert": 1}
    assert ranks_of(plan, unsaid=8) == {"shards": 1, "train": 4, "tune": 8, "convert": 1}
    assert ranks_of(plan, ranks=2, unsaid=8) == {"shards": 1, "train": 2, "tune": 2, "convert": 1}
    with pytest.raises(UserError, match=r"stage train of .* 48 does not divide over 5 ranks; set it to 45"):
        ranks_of(plan, ranks=5)
    plan.write_text(PLAN.replace('kind = "convert"', 'kind = "convert"\nranks = 2'))
    with pytest.raises(UserError, match=r"stage convert of .* 2 ranks, but a stage of kind convert is one process"):
        ranks_of(plan)


def test_torchrun_and_accelerate_start_the_ranks_of_each_node(plan, capsys):
    for name, words in (
        ("torchrun", ["--nnodes=2", "--nproc-per-node=2", "--master-addr=node0", "--node-rank={}"]),
        ("accelerate", ["--num_machines=2", "--num_processes=4", "--main_process_ip=node0", "--machine_rank={}"]),
    ):
        found = printed(plan, Launch(name, nodes=2, rdzv_endpoint="node0:29400"), capsys)
        assert list(found) == [
            "shards (shards), on node 0", "train (supervised, 4 ranks), on node 0",
            "train (supervised, 4 ranks), on node 1", "tune (finetune), on node 0", "convert (convert), on node 0",
        ]  # fmt: skip
        assert found["shards (shards), on node 0"][:3] == ["patchmill", "shards", "build"]
        for node in range(2):
            command = found[f"train (supervised, 4 ranks), on node {node}"]
            assert {word.format(node) for word in words} <= set(command)
            stage = str(plan.parent / "runs" / "x" / "stages" / "train")
            rank = ["--module", "launch.rank", "--quiet", f"{stage}/logs", "train", f"{stage}/config.toml", "--out"]
            assert command[command.index("--module") :] == [*rank, stage, "--json"]


def test_one_machine_needs_no_hosts(plan, capsys):
    found = printed(plan, Launch("torchrun"), capsys)
    assert "--nproc-per-node=4" in found["train (supervised, 4 ranks), on this machine"]
    command = printed(plan, Launch("deepspeed"), capsys)["train (supervised, 4 ranks), on this machine"]
    assert "--master_addr=localhost" in command
    assert "--force_multi" not in command


@pytest.mark.parametrize("remote", ["pdsh", "openmpi"])
def test_deepspeed_takes_as_many_slots_as_ranks_and_hands_no_word_to_a_shell_that_it_could_read(
    tmp_path, monkeypatch, remote
):
    (tmp_path / "hosts").write_text("# ours\nnode1 slots=3  # three\n\nnode2 slots=8\nnode3 slots=8\n")
    assert deepspeed.read_slots(tmp_path / "hosts") == {"node1": 3, "node2": 8, "node3": 8}
    hosts = deepspeed.read_hosts(tmp_path / "hosts", 4)
    assert hosts == {"node1": 3, "node2": 1}
    monkeypatch.setattr("os.getcwd", lambda: f"/data/{ODD}")
    logs = tmp_path / ODD.replace("/", "")
    logs.mkdir()
    start = Start(["train", f"/{ODD}", "--json"], str(logs), 4, 2, "node1", 29500)
    deepspeed.write_hostfile(start, hosts)
    assert (logs / "hostfile").read_text() == "node1 slots=3\nnode2 slots=1\n"
    command = deepspeed.command(start, remote)
    assert {"--force_multi", f"--launcher={remote}", "--master_addr=node1"} <= set(command)
    words = command[command.index("launch.rank") :]
    # As DeepSpeed's pdsh hands them on: words with a space in double quotes, all of them in one line of shell.
    line = " ".join(f'"{word}"' if " " in word else word for word in words)
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {line}"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout.splitlines() == words
    assert not list(tmp_path.rglob("hacked"))
    assert [original(word) for word in words[2:]] == [
        "--meet=node1:29500", f"--folder=/data/{ODD}", "--quiet", str(logs), "train", f"/{ODD}", "--json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node1\n", r"line 1 of hostfile .*'node1' is no line like: node1 slots=8"),
        ("node1 slots=2\nnode1 slots=2\n", r"line 2 of .*node1 is there twice"),
        ("$(touch x) slots=2\n", r"line 1 of .*is no line like"),
        ("node1 slots=2\n", r"has 2 slots for 4 ranks; add hosts, or set --ranks"),
        (None, r"there is no hostfile .*hosts; give a file with lines like"),
    ],
)
def test_a_hostfile_that_does_not_do(tmp_path, text, told):
    if text is not None:
        (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=told):
        deepspeed.read_hosts(tmp_path / "hosts", 4)


def test_a_variable_that_deepspeed_would_hand_to_a_shell_is_refused(tmp_path, monkeypatch):
    for program in ("pdsh", "ompi_info"):
        (tmp_path / program).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/x/$(touch hacked)")
    with pytest.raises(UserError, match=r"PYTHONPATH is '/x/\$\(touch hacked\)', which DeepSpeed hands to a shell"):
        deepspeed.check_remote("pdsh")
    deepspeed.check_remote("openmpi")  # which has no shell
    (tmp_path / "ompi_info").unlink()
    with pytest.raises(UserError, match=r"there is no ompi_info on this machine; install it \(openmpi-bin\)"):
        deepspeed.check_remote("openmpi")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"launcher": "torchrum"}, "there is no launcher 'torchrum' (did you mean 'torchrun'?); give one of local"),
        ({"launcher": "torchrun", "hostfile": "h"}, "--hostfile is a setting of --launcher deepspeed, and the"),
        ({"launcher": "deepspeed", "nodes": 2}, "--nodes is a setting of --launcher torchrun and accelerate, and the"),
        ({"node_rank": 0}, "--node-rank is a setting of --launcher torchrun and accelerate, and the launcher is local"),
        ({"rdzv_endpoint": "a:1"}, "--rdzv-endpoint is a setting of --launcher torchrun and accelerate"),
        ({"launcher": "accelerate", "remote": "pdsh"}, "--remote is a setting of --launcher deepspeed, and the"),
        ({"launcher": "deepspeed", "remote": "rsh"}, "--remote is 'rsh'; give pdsh or openmpi"),
        (
            {"launcher": "torchrun", "rdzv_endpoint": "a:1"},
            "--rdzv-endpoint a:1 is for several nodes; give --nodes N, too, or leave it out",
        ),
        ({"launcher": "accelerate", "node_rank": 0}, "--node-rank 0 is for several nodes; give --nodes N, too"),
        ({"launcher": "torchrun", "nodes": 2}, "--nodes 2 needs --rdzv-endpoint HOST:PORT"),
        ({"launcher": "torchrun", "nodes": 2, "rdzv_endpoint": "node0"}, "'node0' is no HOST:PORT"),
        ({"launcher": "torchrun", "nodes": 2, "rdzv_endpoint": "a:1", "node_rank": 2}, "--node-rank 2 of --nodes 2"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_launcher(settings, told):
    with pytest.raises(UserError) as error:
        Launch(**settings)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_ranks_that_nodes_cannot_share(plan):
    with pytest.raises(UserError, match=r"stage train has 4 ranks, which 3 nodes cannot share evenly; set --ranks"):
        Launch("torchrun", nodes=3, rdzv_endpoint="a:1").check(read_plan(plan, plan.parent / "runs").stages)


def test_a_node_must_know_which_it_is():
    shared = {"launcher": "torchrun", "nodes": 2, "rdzv_endpoint": "a:1"}
    assert [Launch(**shared, node_rank=node).follows() for node in range(2)] == [False, True]
    with pytest.raises(UserError, match=r"--nodes 2 needs --node-rank I, on each node its own, from 0"):
        Launch(**shared).follows()


def test_what_torchrun_says_of_a_rank_that_was_killed_goes_before_what_it_left_the_others_with(tmp_path):
    words = LastWords([tmp_path / "launcher-0.log", tmp_path / "rank-0.log"])
    (tmp_path / "launcher-0.log").write_text(
        "  traceback : Signal 9 (SIGKILL) received by PID 7\nx.ChildFailedError:\n"
    )
    (tmp_path / "rank-0.log").write_text("RuntimeError: Connection closed by peer\n")
    assert words.error() == "Signal 9 (SIGKILL) received by PID 7"


def test_a_full_disk_does_not_hide_how_a_rank_ended(tmp_path):
    """Nothing can be written to /dev/full; of what is on a full disk, an empty file is left."""
    (tmp_path / "ended").symlink_to("/dev/full")
    command = [sys.executable, "-m", "launch.rank", str(tmp_path), "train", "none.toml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (tmp_path / "ended").unlink()
    assert code_of_ranks(tmp_path) is None
    (tmp_path / "ended").touch()
    assert code_of_ranks(tmp_path) is None
    (tmp_path / "ended").write_text("75")
    assert code_of_ranks(tmp_path) == 75


def test_a_launcher_that_ends_well_where_a_rank_did_not_does_not_count(tmp_path):
    """DeepSpeed's ends with 0 where a signal ended what it had started; of its code the rank left an empty file."""
    start = Start([], str(tmp_path / "logs"), 1, 1, "localhost", 1)
    assert drive(["touch", str(tmp_path / "logs" / ENDED)], start, 0) == 1
    assert drive(["true"], start, 0) == 0
