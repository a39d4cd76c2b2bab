"""Node 0 and another, at a real port."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.leader import Leader, follow
from launch.local import free_port
from launch.start import Start
from shards.errors import PatchmillError, StoppedOnRequestError, UserError
from tests.command import done, environment
from tests.images import make_image_folder

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_node_that_waits_for_node_0_stops_when_it_is_asked_to(tmp_path, number):
    make_image_folder(tmp_path / "images", per_class=8)
    (tmp_path / "plan.toml").write_text(
        'name = "x"\n[[stage]]\nname = "shards"\nkind = "shards"\nset.source = "images"'
    )
    command = ["run", "plan.toml", "--launcher", "torchrun", "--nodes", "2", "--node-rank", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *command, "--rdzv-endpoint", f"localhost:{free_port()}"],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
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
