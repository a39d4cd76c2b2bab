"""Node 0 and another, at a real port."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.launchers import Launch
from launch.leader import Leader, follow
from launch.local import free_port
from launch.plan import read_plan
from launch.rank import DRIVER
from launch.run import _run
from launch.start import Start
from launch.status import status_of
from shards.atomic import only_one
from shards.errors import PatchmillError, StoppedOnRequestError, UserError
from tests.command import done, environment, patchmill
from tests.images import build_image_set, make_image_folder, make_slow_images

ALONE = 'name = "x"\n[[stage]]\nname = "shards"\nkind = "shards"\nset = { source = "images" }\n'
TOGETHER = """
name = "x"
[[stage]]
name = "train"
kind = "supervised"
ranks = 2
[stage.set]
duration = "1 step"
global_batch = 12
data = { train = "set", resolution = 16 }
model = { name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }
engine = { kind = "accelerate" }
"""
START = Start(["train", "it's"], "/logs", 2, 2, "localhost", 1)


def following(endpoint: str, asked: bool = False) -> tuple[threading.Thread, list]:
    """Follow in a thread; return what it was told to start, and at last the error that it ended with, or None."""
    told: list = []

    def run() -> None:
        try:
            follow(endpoint, 1, told.append, lambda: asked)
            told.append(None)
        except PatchmillError as error:
            told.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, told


@pytest.mark.parametrize(
    ("code", "kind"), [(0, type(None)), (2, UserError), (75, StoppedOnRequestError), (1, PatchmillError)]
)
def test_the_others_start_what_node_0_starts_and_end_as_it_does(code, kind):
    endpoint = f"localhost:{free_port()}"
    thread, told = following(endpoint)  # which is early, and waits
    leader = Leader(endpoint, 2)
    leader.tell(START)
    leader.tell(START)
    leader.end(code)  # returns when the other has heard
    thread.join(timeout=30)
    assert told[:2] == [START, START]
    assert type(told[2]) is kind
    assert len(told) == 3


def test_a_node_that_is_asked_to_stop_while_it_waits_stops_all():
    endpoint = f"localhost:{free_port()}"
    leader = Leader(endpoint, 2)
    leader.check()
    thread, _ = following(endpoint, asked=True)

    def look_for_a_while() -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            leader.check()
            time.sleep(0.1)

    with pytest.raises(StoppedOnRequestError, match="stopped between two stages, on request of node 1"):
        look_for_a_while()
    with pytest.raises(StoppedOnRequestError):
        leader.tell(START)
    leader.end(75)
    thread.join(timeout=30)
    assert not thread.is_alive()


def begin(folder: Path, node: int, endpoint: str, *options: str) -> subprocess.Popen:
    """Start ``patchmill run`` as one of two nodes."""
    command = ["run", "plan.toml", "--launcher", "torchrun", "--nodes", "2", "--node-rank", str(node), *options]
    return subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *command, "--rdzv-endpoint", endpoint],
        cwd=folder, env=environment(), stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which shells ignore in the background
    )  # fmt: skip


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.long
def test_node_0_stops_what_it_does_alone_when_another_is_asked_to_stop(tmp_path):
    make_slow_images(tmp_path / "images", 96)
    (tmp_path / "plan.toml").write_text(ALONE.replace("}", ', shard_samples = 2, format = "webp", workers = 1 }'))
    endpoint = f"localhost:{free_port()}"
    nodes = [begin(tmp_path, node, endpoint) for node in range(2)]
    built = tmp_path / "runs/x/stages/shards/data/shards"
    wait_for(lambda: list(built.glob("[0-9]*.tar")))
    nodes[1].terminate()
    ends = [done(process) for process in nodes]
    assert [code for code, _ in ends] == [75, 75], ends
    assert 0 < len(list(built.glob("[0-9]*.tar"))) < 48
    assert [stage.state for stage in status_of(tmp_path / "runs/x")] == ["stopped"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_node_0_is_asked_to_stop_while_it_waits_for_another_run(tmp_path, number):
    build_image_set(tmp_path, per_class=8)
    (tmp_path / "plan.toml").write_text(TOGETHER)
    logs = tmp_path / "runs/x/stages/train/logs"
    with only_one(logs / DRIVER, "patchmill run"):
        nodes = [begin(tmp_path, node, endpoint) for endpoint in [f"localhost:{free_port()}"] for node in range(2)]
        for line in nodes[0].stderr:
            if line.startswith("waiting for another patchmill run, which is writing to "):
                break
        nodes[0].send_signal(number)
        ends = [done(process) for process in nodes]
    assert [code for code, _ in ends] == [130 if number == signal.SIGINT else 75, 75], ends
    assert [stage.state for stage in status_of(tmp_path / "runs/x")] == ["stopped"]


def test_a_stage_before_which_another_node_was_asked_to_stop_has_stopped_and_not_failed(tmp_path):
    make_image_folder(tmp_path / "images", per_class=2)
    (tmp_path / "plan.toml").write_text(ALONE)
    plan = read_plan(tmp_path / "plan.toml", tmp_path / "runs")
    endpoint = f"localhost:{free_port()}"
    launch = Launch("torchrun", nodes=2, node_rank=0, rdzv_endpoint=endpoint)
    with launch.leading():
        thread, _ = following(endpoint, asked=True)
        wait_for(lambda: launch._leader._store.check(["stop"]))
        with pytest.raises(StoppedOnRequestError, match="stopped between two stages, on request of node 1"):
            _run(plan.stages[0], launch)
    thread.join(timeout=30)
    (plan.run / "plan.toml").write_text(ALONE)
    (told,) = status_of(plan.run)
    assert (told.state, told.why) == ("stopped", "stopped between two stages, on request of node 1")


@pytest.mark.long
def test_of_a_finished_plan_nodes_wait_for_each_other_only_where_it_is_made_anew(tmp_path):
    make_image_folder(tmp_path / "images", per_class=2)
    (tmp_path / "plan.toml").write_text(ALONE)
    assert patchmill("run", "plan.toml", cwd=tmp_path).returncode == 0
    endpoint = f"localhost:{free_port()}"
    with socket.create_server(("", int(endpoint.rpartition(":")[2]))):  # where node 0 cannot lead
        ends = [done(begin(tmp_path, node, endpoint)) for node in range(2)]
    assert [code for code, _ in ends] == [0, 0], ends
    other = begin(tmp_path, 1, endpoint, "--from", "shards")
    assert other.stderr.readline().startswith("waiting for node 0 at localhost:")
    ends = [done(process) for process in (begin(tmp_path, 0, endpoint, "--from", "shards"), other)]
    assert [code for code, _ in ends] == [0, 0], ends
    assert "shards is made anew" in ends[0][1]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_node_that_waits_for_node_0_stops_when_it_is_asked_to(tmp_path, number):
    make_image_folder(tmp_path / "images", per_class=8)
    (tmp_path / "plan.toml").write_text(ALONE)
    process = begin(tmp_path, 1, f"localhost:{free_port()}")
    assert process.stderr.readline().startswith("waiting for node 0 at localhost:")
    process.send_signal(number)
    code, stderr = done(process)
    assert code == 75
    assert stderr.endswith("error: stopped before node 0 was there; run again to go on\n")


def test_when_node_0_is_gone_the_others_say_so():
    endpoint = f"localhost:{free_port()}"
    leader = Leader(endpoint, 2)
    thread, told = following(endpoint)
    leader.tell(START)
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        time.sleep(0.1)
    del leader
    thread.join(timeout=30)
    assert told[0] == START
    assert str(told[1]).startswith("node 0 is gone: ")


def test_a_port_that_another_has_is_refused():
    endpoint = f"localhost:{free_port()}"
    first = Leader(endpoint, 2)
    with pytest.raises(UserError, match=r"port \d+ of --rdzv-endpoint cannot be had: .*; give another"):
        Leader(endpoint, 2)
    del first
