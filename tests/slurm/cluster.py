"""A real Slurm cluster on this machine: munged, slurmctld, and a slurmd for each of its nodes, on ports of their own.

    python tests/slurm/cluster.py start     # make slurm
    python tests/slurm/cluster.py stop      # make slurm-stop

Debian's packages are installed where they are missing (root). No file of the system is touched but /etc/hosts, which
gets the names of the nodes, n1 and n2, until the cluster is stopped. Each node says that it has 4 cores and 2 GPUs,
whatever the machine has; the GPUs cannot be used.

Partitions: ``debug``; and ``low``, whose jobs those of ``high`` pre-empt, 20 seconds after they were told.
"""

import contextlib
import fcntl
import glob
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FOLDER, PORT = Path("/tmp/patchmill-slurm"), 17000
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge")
HOSTS = Path("/etc/hosts")

CONF = """
ClusterName=patchmill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
KillWait=5
MinJobAge=86400
SlurmdTimeout=5
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=4 Sockets=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:2
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP
PartitionName=debug Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low PriorityTier=1 GraceTime=20
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(RuntimeError):
    """The cluster does not do what it was asked for; the message has the words of what failed."""


class Cluster:
    """One cluster: its files and its ports.

    Args:
        folder: For its settings, state and logs; made, and removed when it stops.
        port: Of slurmctld; those of the nodes follow.
        nodes: How many.
    """

    def __init__(self, folder: Path = FOLDER, port: int = PORT, nodes: int = 2):
        self.folder, self.port, self.nodes = folder, port, [f"n{number + 1}" for number in range(nodes)]
        self.conf = folder / "slurm.conf"
        self._mark = f" # {folder}\n"  # of its lines in /etc/hosts

    def start(self) -> None:
        """Start it, unless it runs; whatever is left of one before is stopped first.

        Raises:
            ClusterError: Something does not start.
        """
        install()
        if self._is_up():
            return
        self.stop()
        for name in ("state", "log", "munge", *(f"spool.{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self._write()
        try:
            self._start_munge()
            self._name_nodes()
            self.start_controller("-c")
            for node in self.nodes:
                self.start_node(node)
            wait_for(lambda: self._is_up() or not self._controls(), 30, "all nodes to be idle")
            if not self._controls():
                raise ClusterError("slurmctld ended")
        except ClusterError as error:
            told = "".join(f"\n--- {log.name}\n{log.read_text()[-1500:]}" for log in self.folder.glob("log/*"))
            self.stop()
            raise ClusterError(f"the cluster does not start: {error}{told}") from None

    def stop(self) -> None:
        """Stop everything of it, jobs too, and remove its files; where there is nothing, do nothing."""
        if self.conf.exists():
            if (self.folder / "slurmctld.pid").exists():
                with contextlib.suppress(ClusterError):
                    self.cancel_all()
            for daemon in ["slurmctld", *(f"slurmd.{node}" for node in self.nodes)]:
                self.end(daemon, signal.SIGTERM)
            for pid in _processes():
                if _program(pid) == "slurmstepd" and self._runs(pid):  # its job would not go
                    _signal(pid, signal.SIGKILL)
        self.end("munge/munged", signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)
        with _locked(HOSTS):
            lines = HOSTS.read_text().splitlines(keepends=True)
            if any(line.endswith(self._mark) for line in lines):
                HOSTS.write_text("".join(line for line in lines if not line.endswith(self._mark)))  # it may be a mount

    def run(self, *command: object, timeout: float = 30) -> str:
        """Run a command of Slurm's on this cluster and return its stdout."""
        try:
            done = subprocess.run(
                [str(word) for word in command], env={**os.environ, "SLURM_CONF": str(self.conf)},
                capture_output=True, text=True, timeout=timeout,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{command[0]} gave no answer in {timeout:.0f} s") from None
        if done.returncode:
            raise ClusterError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout

    def cancel_all(self) -> None:
        """End all jobs and wait until they are gone."""
        self.run("scancel", "--user", "root", timeout=10)
        wait_for(lambda: not self.run("squeue", "-h", timeout=10), 20, "the jobs to end")

    def start_controller(self, *options: str) -> None:
        """Start slurmctld; with ``-c`` it forgets all jobs."""
        self.run("slurmctld", *options)
        wait_for((self.folder / "slurmctld.pid").exists, 10, "slurmctld to start")

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self.run("slurmd", "-N", node)

    def kill_node(self, node: str) -> None:
        """Let a node die: its slurmd and everything that runs on it, at once."""
        self.end(f"slurmd.{node}", signal.SIGKILL)

        def is_empty() -> bool:
            running = [*self._steps(node), *self.tasks(node)]  # the steps first: they could start more tasks
            for pid in running:
                _signal(pid, signal.SIGKILL)
            return not running

        wait_for(is_empty, 10, f"everything on {node} to be gone")  # what is killed goes a little later

    def tasks(self, node: str) -> list[int]:
        """Return the processes of jobs on a node."""
        found = []
        for pid in _processes():
            variables = _environment(pid)
            if variables.get("SLURM_CONF") == str(self.conf) and variables.get("SLURMD_NODENAME") == node:
                found.append(pid)
        return found

    def _steps(self, node: str) -> list[int]:
        """Return the processes that start and watch the tasks on a node: they write into the log of its slurmd."""
        log = str(self.folder / "log" / f"slurmd.{node}.log")
        return [pid for pid in _processes() if _program(pid) == "slurmstepd" and log in _open_files(pid)]

    def end(self, daemon: str, number: int) -> None:
        """Send a signal to a daemon of this cluster, and wait until it is gone."""
        pid, program = self._pid(daemon), Path(daemon).name.split(".")[0]
        if pid and _program(pid) == program:
            _signal(pid, number)
            try:
                wait_for(lambda: _program(pid) != program, 10, f"{daemon} to end")
            except ClusterError:
                _signal(pid, signal.SIGKILL)
        (self.folder / f"{daemon}.pid").unlink(missing_ok=True)

    def _pid(self, daemon: str) -> int:
        file = self.folder / f"{daemon}.pid"
        return int(file.read_text() or 0) if file.exists() else 0

    def _controls(self) -> bool:
        return _program(self._pid("slurmctld")) == "slurmctld"

    def _runs(self, pid: int) -> bool:
        """Tell whether a process was started by a daemon of this cluster: where its logs are."""
        try:
            return os.readlink(f"/proc/{pid}/cwd").startswith(f"{self.folder}/")
        except OSError:
            return False

    def _is_up(self) -> bool:
        if not (self.folder / "slurmctld.pid").exists():
            return False
        try:
            states = self.run("sinfo", "-h", "-N", "-o", "%N %T", timeout=10).splitlines()
        except ClusterError:
            return False
        return {tuple(line.split()) for line in states} >= {(node, "idle") for node in self.nodes}

    def _write(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self.port + number}"
            for number, node in enumerate(self.nodes, start=1)
        )
        self.conf.write_text(CONF.format(host=host, port=self.port, folder=self.folder, nodes=nodes))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd looks for a mounted one
        gpus = "".join(
            f"NodeName={node} Name=gpu File=/dev/{device}\n" for node in self.nodes for device in ("null", "zero")
        )
        (self.folder / "gres.conf").write_text(gpus)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        folder.chmod(0o755)
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "munged.pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        self.run("munged", *(f"--{option}={folder / name}" for option, name in files.items()))
        wait_for((folder / "socket").exists, 10, "munged to start")

    def _name_nodes(self) -> None:
        try:
            with _locked(HOSTS), open(HOSTS, "a") as hosts:
                hosts.writelines(f"127.0.0.1 {node}{self._mark}" for node in self.nodes)
        except OSError as error:
            raise ClusterError(f"{', '.join(self.nodes)} cannot be added to {HOSTS}: {error}") from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until no other cluster changes a file, and let none until it is changed."""
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install() -> None:
    """Install the packages that are missing.

    Raises:
        ClusterError: That needs root, or apt fails.
    """
    needed = ("slurmctld", "slurmd", "sbatch", "munged")
    path = f"{os.environ['PATH']}:/usr/sbin"
    os.environ["PATH"] = path
    if all(shutil.which(command) for command in needed):
        return
    if os.getuid() != 0:
        raise ClusterError(f"Slurm is not installed; as root: apt-get install {' '.join(PACKAGES)}")
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    commands = [
        ["apt-get", "update", "-qq"],
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES],
    ]
    for command in commands:
        done = subprocess.run(command, env=quiet, capture_output=True, text=True)
        if done.returncode:
            raise ClusterError(f"{' '.join(command)}: {done.stderr.strip()}")


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until a condition holds.

    Raises:
        ClusterError: It does not, in so many seconds.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.1)


def _processes() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in text.split("\0") if "=" in line)


def _open_files(pid: int) -> set[str]:
    found = set()
    for entry in glob.glob(f"/proc/{pid}/fd/*"):
        with contextlib.suppress(OSError):  # it was closed, or the process ended
            found.add(os.readlink(entry))
    return found


def _program(pid: int) -> str:
    """Return which program a process runs; of one that ended, none, be it a zombie still."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    program, _, rest = text.partition("(")[2].rpartition(")")
    return "" if rest.split()[0] == "Z" else program


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> int:
    """Start or stop the cluster that ``make slurm`` is about."""
    cluster = Cluster()
    if sys.argv[1:] not in (["start"], ["stop"]):
        print(f"usage: {sys.argv[0]} start|stop", file=sys.stderr)
        return 2
    try:
        if sys.argv[1] == "start":
            cluster.start()
            print(cluster.run("sinfo"), end="")
            print(f"\nTo use it: export SLURM_CONF={cluster.conf}")
        else:
            cluster.stop()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
