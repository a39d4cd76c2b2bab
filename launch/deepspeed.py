"""DeepSpeed's launcher: one command, on the first node of a hostfile, which reaches the others by pdsh or mpirun."""

import os
import re
import shutil
import sys
from pathlib import Path

from launch.rank import plain
from launch.start import Start
from shards.errors import UserError

NEEDS = {"pdsh": ("pdsh", "pdsh"), "openmpi": ("ompi_info", "openmpi-bin")}  # program, Debian's package
HANDED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # beginnings of variables that DeepSpeed hands to other nodes
OTHERWISE = "use --remote openmpi"


def read_slots(path: Path) -> dict[str, int]:
    """Return how many ranks each host of a hostfile can take, in its order.

    Raises:
        UserError: There is no such file, or a line is none of a hostfile.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise UserError(f"there is no hostfile {path}; give a file with lines like: node1 slots=8") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        found = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s+slots=([1-9]\d*)", text)
        if not found or found[1] in slots:
            why = f"{found[1]} is there twice" if found else f"{line.strip()!r} is no line like: node1 slots=8"
            raise UserError(f"line {number} of hostfile {path}: {why}")
        slots[found[1]] = int(found[2])
    return slots


def read_hosts(path: Path | None, ranks: int) -> dict[str, int]:
    """Return how many of so many ranks each host of a hostfile takes; without one this machine takes all.

    Raises:
        UserError: The hosts do not hold the ranks; or as of ``read_slots``.
    """
    if path is None:
        return {"localhost": ranks}
    slots = read_slots(path)
    taken, left = {}, ranks
    for host, room in slots.items():
        if left:
            taken[host] = min(room, left)
            left -= taken[host]
    if left:
        raise UserError(f"hostfile {path} has {sum(slots.values())} slots for {ranks} ranks; add hosts, or set --ranks")
    return taken


def check_remote(remote: str) -> None:
    """Check that DeepSpeed can reach hosts.

    Raises:
        UserError: What it goes by is not installed; or it would put what a shell understands into its command line.
    """
    program, package = NEEDS[remote]
    if shutil.which(program) is None:
        raise UserError(f"there is no {program} on this machine; install it ({package}), or choose another --remote")
    if remote == "pdsh":  # of which DeepSpeed makes one line of shell, with nothing quoted, and pdsh knows %
        for name, value in os.environ.items():
            if name.startswith(HANDED_ON) and re.search(r'["$`\\%\n]', value):
                raise UserError(
                    f"{name} is {value!r}, which DeepSpeed hands to a shell as it is; change it, or {OTHERWISE}"
                )
        if plain(sys.executable) != sys.executable:
            raise UserError(f"pdsh cannot start {sys.executable!r}; use a Python whose path is plain, or {OTHERWISE}")


def command(start: Start, remote: str | None) -> list[str]:
    """Return the command that starts all ranks; ``remote`` None: they are on this machine."""
    words = [
        sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={hostfile_of(start)}", "--no_ssh_check",
        f"--master_addr={start.address}", f"--master_port={start.port}", "--no_local_rank",
    ]  # fmt: skip
    if remote is not None:
        words += ["--force_multi", f"--launcher={remote}"]
    if remote == "openmpi":  # which else gives each rank one core, and tells nobody where the ranks meet
        words += ["--launcher_args=--bind-to none"]
    options = [f"--meet={start.address}:{start.port}", f"--folder={os.getcwd()}"]
    name, *rest = start.rank(*options)
    return [*words, "--module", name, "--plain", *map(plain, rest)]


def hostfile_of(start: Start) -> Path:
    """Return where the hostfile of a start is."""
    return Path(start.logs) / "hostfile"


def write_hostfile(start: Start, hosts: dict[str, int]) -> None:
    """Write the hostfile of a start: the slots that it takes, since under MPI DeepSpeed fills all there are."""
    hostfile_of(start).write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()))
