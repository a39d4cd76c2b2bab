"""One plan under each launcher, for real: the same weights; stopped it saves and goes on; no rank is left behind."""

import getpass
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.local import free_port
from tests.command import done, environment, losses, patchmill, wait_for_steps
from tests.images import build_image_set

ODD = """it's "my" $(touch hacked) `x` ; # %h & plan"""
PLAN = """
name = "tiny"
[[stage]]
name = "train"
kind = "supervised"
ranks = 2
[stage.set]
duration = "400 steps"
global_batch = 12
log_every = "10 steps"
checkpoint = { every = "1000 steps" }
data = { train = "set", resolution = 16 }
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 2 }
engine = { kind = "accelerate" }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the plan, whose name no shell may read."""
    folder = tmp_path_factory.mktemp("launchers") / ODD
    build_image_set(folder, per_class=8, shard_samples=16)
    (folder / "plan.toml").write_text(PLAN)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """The stage's folder, run by us."""
    finished = patchmill("run", "plan.toml", "--runs", "local", cwd=folder)
    assert finished.returncode == 0, finished.stderr
    return stage(folder, "local")


def stage(folder: Path, runs: str) -> Path:
    return folder / runs / "tiny" / "stages" / "train"


def begin(folder: Path, runs: str, *options: str, plan: str = "plan.toml", **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "run", plan, "--runs", runs, *options],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**env),
    )  # fmt: skip


def same(one: Path, other: Path) -> bool:
    compared = patchmill("checkpoint", "diff", one, other, "--json", cwd=one)
    assert compared.returncode == 0, compared.stderr
    found = json.loads(compared.stdout)
    assert found["samples"] == [400 * 12] * 2
    assert found["world_sizes"] == [2, 2]
    return found["same"]


def ranks_of(folder: Path) -> list[psutil.Process]:
    """Return the ranks, of whatever parent, that work below a folder's; of its own name launchers make another."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "launch.rank" in words[:4] and any(f"{folder.parent}/" in word for word in words):
            found.append(process)
    return found


def wait_until_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.long
def test_torchrun_is_stopped_by_a_signal_that_it_would_die_of_and_patchmill_ends_with_code_75(folder):
    process = begin(folder, "torchrun", "--launcher", "torchrun")
    wait_for_steps(stage(folder, "torchrun"), process, 3)
    ranks = ranks_of(folder)
    assert sorted(rank.environ()["RANK"] for rank in ranks) == ["0", "1"]
    process.send_signal(signal.SIGUSR1)
    code, stderr = done(process)
    assert code == 75, stderr
    assert "stopped on request at" in stderr  # what rank 0 says, and nothing of torchrun's
    assert "Traceback" not in stderr
    assert "ChildFailedError" in (stage(folder, "torchrun") / "logs" / "launcher-0.log").read_text()
    assert json.loads((stage(folder, "torchrun") / "stopped.json").read_text())["checkpoint"]
    assert not any(rank.is_running() for rank in ranks)
    assert not list(folder.parent.rglob("hacked"))


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["accelerate", "deepspeed"])
def test_a_short_stage_under_another_launcher(folder, launcher):
    short, runs = PLAN.replace("400 steps", "3 steps"), f"short-{launcher}"
    (folder / f"{runs}.toml").write_text(short)
    code, stderr = done(begin(folder, runs, "--launcher", launcher, plan=f"{runs}.toml"))
    assert code == 0, stderr
    made = stage(folder, runs)
    result = json.loads((made / "result.json").read_text())["result"]
    assert (result["steps"], result["samples"]) == (3, 36)
    saved = json.loads((Path(result["checkpoint"]) / "checkpoint.json").read_text())
    assert saved["world_size"] == 2
    assert (made / "logs" / "launcher-0.log").exists()
    assert (made / "logs" / "rank-1.log").exists()
    assert not ranks_of(folder)
    assert not list(folder.parent.rglob("hacked"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate", "deepspeed"])
def test_stopped_and_gone_on_under_another_launcher_it_ends_with_the_same_weights(folder, undisturbed, launcher):
    runs = f"one-{launcher}"
    process = begin(folder, runs, "--launcher", launcher)
    wait_for_steps(stage(folder, runs), process, 3)
    process.terminate()
    code, stderr = done(process)
    assert code == 75, stderr
    assert len(losses(stage(folder, runs))) < 40
    assert not ranks_of(folder)
    code, stderr = done(begin(folder, runs, "--launcher", launcher))
    assert code == 0, stderr
    assert "Traceback" not in stderr
    assert losses(stage(folder, runs)) == losses(undisturbed)
    assert same(stage(folder, runs), undisturbed)
    again = patchmill("run", "plan.toml", "--runs", runs, cwd=folder)  # by whatever launcher it was made
    assert "done before, skipped" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_nodes_are_one_run_stopped_at_either(folder, undisturbed, launcher):
    runs = f"nodes-{launcher}"

    def nodes() -> list[subprocess.Popen]:
        shared = ("--launcher", launcher, "--nodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
        return [begin(folder, runs, *shared, "--node-rank", str(node)) for node in range(2)]

    both = nodes()
    wait_for_steps(stage(folder, runs), both[0], 3)
    assert len(ranks_of(folder)) == 2
    both[1].terminate()
    ends = [done(process) for process in both]
    assert [code for code, _ in ends] == [75, 75], ends
    assert not ranks_of(folder)
    ends = [done(process) for process in nodes()]
    assert [code for code, _ in ends] == [0, 0], ends
    assert same(stage(folder, runs), undisturbed)
    assert (stage(folder, runs) / "logs" / "launcher-1.log").exists()
    late = done(begin(folder, runs, "--launcher", launcher, "--nodes", "2", "--rdzv-endpoint", "localhost:1",
                      "--node-rank", "1"))  # fmt: skip
    assert late[0] == 0, late  # all is done: nobody needs to be waited for


@pytest.mark.slow
def test_a_mistake_that_the_ranks_find_is_told_once_and_ends_all_nodes_with_code_2(folder):
    process = begin(folder, "mistake")
    wait_for_steps(stage(folder, "mistake"), process, 3)
    process.terminate()
    assert done(process)[0] == 75
    shared = ("--launcher", "torchrun", "--nodes", "2", "--rdzv-endpoint", f"localhost:{free_port()}")
    (folder / "other.toml").write_text(PLAN.replace("[stage.set]", "[stage.set]\nseed = 1"))
    both = [begin(folder, "mistake", *shared, "--node-rank", str(node), plan="other.toml") for node in range(2)]
    ends = [done(process) for process in both]
    assert [code for code, _ in ends] == [2, 2], ends
    assert ends[0][1].count("seed changed from 0 to 1; set it back") == 1
    assert "Traceback" not in "".join(stderr for _, stderr in ends)
    assert "error: node 0 ended with exit code 2, and says why" in ends[1][1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a rank", "torchrun", "patchmill"])
def test_whoever_is_killed_the_others_end(folder, undisturbed, victim):
    runs = f"killed-{victim.replace(' ', '-')}"
    process = begin(folder, runs, "--launcher", "torchrun")
    wait_for_steps(stage(folder, runs), process, 3)
    ranks = ranks_of(folder)
    launcher = next(
        child for child in psutil.Process(process.pid).children() if "torch.distributed.run" in child.cmdline()
    )
    everybody = [launcher, *ranks]
    killed = {"a rank": ranks[1], "torchrun": launcher, "patchmill": process}[victim]
    killed.kill()
    began = time.monotonic()
    if victim == "patchmill":  # who starts it again at once waits for those that are still saving
        assert len(ranks_of(folder)) == 2
        code, stderr = done(begin(folder, runs, "--launcher", "torchrun"))
        assert code == 0, stderr
        assert same(stage(folder, runs), undisturbed)
    code, stderr = done(process)
    wait_until_gone(everybody)
    assert time.monotonic() - began < 60 or victim == "patchmill"
    if victim == "a rank":
        assert code == 1, stderr
        assert "Signal 9 (SIGKILL)" in stderr
    else:
        assert (stage(folder, runs) / "stopped.json").exists() == (victim == "torchrun")
        assert code == (75 if victim == "torchrun" else -signal.SIGKILL), stderr


@pytest.fixture
def sshd(tmp_path):
    """A server of ssh on this machine; yields the words that ssh needs to reach it as root or whoever runs this."""
    if not (shutil.which("pdsh") and shutil.which("mpirun") and Path("/usr/sbin/sshd").exists()):
        pytest.skip("needs Debian's pdsh, openmpi-bin and openssh-server")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    shutil.copy(tmp_path / "user.pub", tmp_path / "authorized")
    port = free_port()
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nListenAddress 127.0.0.2\nHostKey {tmp_path}/host\nPidFile none\n"
        f"AuthorizedKeysFile {tmp_path}/authorized\nStrictModes no\nPermitRootLogin yes\nMaxStartups 100\n"
        "UsePAM no\nSetEnv OMP_NUM_THREADS=1\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL)
    words = f"-p {port} -i {tmp_path}/user -l {getpass.getuser()} -o StrictHostKeyChecking=no"
    words += " -o UserKnownHostsFile=/dev/null"
    deadline = time.monotonic() + 30
    while subprocess.run(["ssh", *words.split(), "-q", "localhost", "true"]).returncode:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield words
    server.terminate()
    server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("remote", ["pdsh", "openmpi"])
def test_deepspeed_over_two_hosts(folder, undisturbed, sshd, remote):
    """Of one machine: two addresses of it, which Open MPI takes for two."""
    runs = f"hosts-{remote}"
    (folder / "hosts").write_text("localhost slots=1\n127.0.0.2 slots=1\n")
    env = {"PDSH_SSH_ARGS_APPEND": sshd, "OMPI_MCA_plm_rsh_args": sshd, "OMPI_MCA_plm_rsh_agent": "ssh"}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_btl": "self,tcp"}
    options = ("--launcher", "deepspeed", "--hostfile", "hosts", "--remote", remote)
    process = begin(folder, runs, *options, **env)
    wait_for_steps(stage(folder, runs), process, 3)
    ranks = ranks_of(folder)
    assert len(ranks) == 2
    if remote == "pdsh":
        process.terminate()
        code, stderr = done(process)
        assert code == 75, stderr
        assert not ranks_of(folder)
    else:  # of which mpirun hears nothing
        process.kill()
        wait_until_gone(ranks)
    assert (stage(folder, runs) / "stopped.json").exists()
    code, stderr = done(begin(folder, runs, *options, **env))
    assert code == 0, stderr
    assert same(stage(folder, runs), undisturbed)
    assert not list(folder.parent.rglob("hacked"))
