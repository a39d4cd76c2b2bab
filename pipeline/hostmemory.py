"""Host memory that is free: of the machine, and of every control group that this process is in."""

import os
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Version(NamedTuple):
    """How a version of the kernel's control groups names things: a line of ``/proc/self/cgroup``, folder and files."""

    line: str
    folder: str
    limit: str
    used: str
    cached: str


VERSIONS = (
    Version("0::", "", "memory.max", "memory.current", "inactive_file"),
    Version(":memory:", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes of host memory that are free; in a container or a job, those left of the least of its limits.

    Args:
        proc: Where the kernel tells of processes.
        groups: Where it tells of control groups.
    """
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    return min([machine, *_left_of_limits(proc, groups)])


def _left_of_limits(proc: Path, groups: Path) -> list[float]:
    """Return what is left of the limit of this process's control group, and of each that it lies in."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for version in VERSIONS:
        for own in (PurePosixPath(line.partition(version.line)[2]) for line in lines if version.line in line):
            for group in (own, *own.parents):
                folder = groups / version.folder / group.relative_to("/")
                try:
                    limit, used = (int((folder / name).read_text()) for name in (version.limit, version.used))
                    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # not to be seen from in here, or "max"
                    continue
                # Files that were read and are no longer in use count as used, and go when anybody wants their room.
                left.append(max(0.0, float(limit - used + int(stat[version.cached]))))
    return left
