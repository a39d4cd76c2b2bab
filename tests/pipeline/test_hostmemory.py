"""Free memory of machines, containers and jobs, as the kernel tells it in /proc and /sys/fs/cgroup."""

from pathlib import Path

import pytest

from pipeline.hostmemory import free_memory

GB = 10**9
JOB = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"
MEMINFO = "MemTotal:       131893248 kB\nMemFree:         1000000 kB\nMemAvailable:   100000000 kB\nBuffers:  9 kB\n"
MACHINE = 100_000_000 * 1024


@pytest.fixture
def kernel(tmp_path):
    """Folders as the kernel's of a machine that has 102.4 GB to give, and a process in the group of a path."""

    def told(line: str) -> tuple[Path, Path]:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(MEMINFO)
        (tmp_path / "proc/self/cgroup").write_text(line)
        (tmp_path / "groups").mkdir()
        return tmp_path / "proc", tmp_path / "groups"

    return told


def group(folder: Path, limit: object, used: int, inactive: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - inactive}\nfile {inactive}\ninactive_file {inactive}\n")


def test_files_that_a_container_has_read_leave_room(kernel):
    proc, groups = kernel("0::/\n")
    group(groups, 16 * GB, used=15 * GB, inactive=12 * GB)
    assert free_memory(proc, groups) == 13 * GB


def test_a_job_has_the_least_that_any_of_its_groups_leaves(kernel):
    proc, groups = kernel(f"0::/{JOB}\n")
    group(groups / JOB, "max", used=1 * GB, inactive=0)
    group((groups / JOB).parents[2], 24 * GB, used=10 * GB, inactive=2 * GB)  # the job's --mem
    group((groups / JOB).parents[3], 60 * GB, used=30 * GB, inactive=0)
    assert free_memory(proc, groups) == 16 * GB
    group((groups / JOB).parents[3], 60 * GB, used=59 * GB, inactive=0)  # its neighbours'
    assert free_memory(proc, groups) == 1 * GB


def test_the_older_groups_are_asked_as_well(kernel):
    proc, groups = kernel("12:cpu,cpuacct:/\n4:memory:/slurm/uid_1/job_7\n0::/\n")
    job = groups / "memory/slurm/uid_1/job_7"
    job.mkdir(parents=True)
    for folder, limit in ((job, 8 * GB), (groups / "memory", 9223372036854771712)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{6 * GB}\n")
        (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {GB}\n")
    assert free_memory(proc, groups) == 3 * GB


@pytest.mark.parametrize("line", ["0::/\n", f"0::/{JOB}\n", "0::/../elsewhere\n", ""])
def test_without_a_limit_it_is_the_machines(kernel, line):
    proc, groups = kernel(line)
    group(groups, "max", used=GB, inactive=0)
    assert free_memory(proc, groups) == MACHINE


def test_a_group_over_its_limit_leaves_nothing(kernel):
    proc, groups = kernel("0::/\n")
    group(groups, GB, used=2 * GB, inactive=0)
    assert free_memory(proc, groups) == 0


def test_the_free_memory_is_some_of_this_machines():
    assert 10**7 < free_memory() < 10**14
