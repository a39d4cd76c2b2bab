"""The cluster that all other tests here stand on."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, ClusterError, wait_for

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parent / "cluster.py"


def command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120)


def test_a_step_has_a_task_on_each_of_two_nodes(cluster):
    told = cluster.run("srun", "--nodes=2", "--ntasks=2", "bash", "-c", "echo $SLURM_PROCID $SLURMD_NODENAME")
    assert sorted(told.splitlines()) == ["0 n1", "1 n2"]


def test_started_twice_stopped_twice():
    for _ in range(2):
        started = command("start")
        assert started.returncode == 0, started.stderr
        assert "idle n[1-2]" in started.stdout
        assert "export SLURM_CONF=/tmp/patchmill-slurm/slurm.conf" in started.stdout
    for _ in range(2):
        assert command("stop").returncode == 0
    assert not Path("/tmp/patchmill-slurm").exists()


def test_a_port_that_is_taken_is_told_and_nothing_is_left(cluster):
    other = Cluster(cluster.folder.with_name("patchmill-slurm-other"), port=cluster.port)
    with pytest.raises(ClusterError, match="does not start"):
        other.start()
    assert not other.folder.exists()
    assert "idle" in cluster.run("sinfo")
    assert socket.gethostbyname("n2") == "127.0.0.1"


def test_a_node_dies_with_what_runs_on_it_and_comes_back(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/bash\nsrun --nodes=2 --ntasks=2 sleep 300\n")
    number = cluster.run("sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/log", script).strip()

    wait_for(lambda: cluster.tasks("n2"), 60, "the task of n2")
    cluster.kill_node("n2")
    assert not cluster.tasks("n2")
    wait_for(lambda: "down" in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T"), 60, "n2 to be down")
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", number)  # requeued, as for every lost node
    cluster.run("scancel", number)
    cluster.start_node("n2")
    wait_for(lambda: "idle" in cluster.run("sinfo", "-h", "-n", "n2", "-o", "%T"), 30, "n2 to be back")
