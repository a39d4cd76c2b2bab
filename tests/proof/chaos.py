"""Does the faults that faults.py drew to a run on the cluster, one after the other, and notes what became of each."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from launch.submission import Record
from shards.errors import PatchmillError
from tests.command import losses
from tests.proof.faults import CYCLE, DISK, KILLS, RANKS, STORAGE, Fault
from tests.proof.storage import Storage
from tests.slurm.cluster import ClusterError, wait_for
from tests.slurm.runs import Submitted

BACK = 240.0  # seconds, at most, from a fault to the first step beyond it, on a machine that others use too
NEXT = 600.0  # seconds, at most, from one fault to the next moment
LEFT = 150_000  # bytes on a full disk: a few lines more, and no checkpoint
COUNTS = {"error": 6, "reset": 6, "cut": 4, "stall": 2, "flip": 4}  # answers that are spoiled at once


class Chaos:
    """Disturbs a run.

    Args:
        run: Submitted.
        storage: That it reads from.
        disk: The small file system that the run's folder is on.
        seed: Of what is drawn while it goes on: which rank, which node.
    """

    def __init__(self, run: Submitted, storage: Storage, disk: Path, seed: int):
        self._run, self._storage, self._disk, self._draw = run, storage, disk, random.Random(seed)
        self._cycle = iter(CYCLE * 10)

    def disturb(self, faults: list[Fault]) -> None:
        """Do all faults, in order, as far as the run survives them."""
        for number, fault in enumerate(faults, start=1):
            try:
                self._disturb(fault)
            except (ClusterError, PatchmillError, AssertionError, OSError, subprocess.SubprocessError) as error:
                fault.outcome = f"failed: {' '.join(str(error).split())[-300:]}"
            print(f"{number}/{len(faults)} {fault}", file=sys.stderr, flush=True)
            if fault.outcome.startswith("failed"):
                return

    def _disturb(self, fault: Fault) -> None:
        ranks: list[tuple[str, int]] = []

        def is_time() -> bool:
            ranks[:] = self._ranks(fault.stage)
            return self._ended(fault.stage) or bool(ranks and self._at(fault.stage) >= fault.samples)

        wait_for(is_time, NEXT, f"{fault.stage} to be at {fault.samples} samples")
        began = time.monotonic()
        if self._ended(fault.stage):
            fault.outcome = "came too late"
            return
        restarts = self._restarts(fault.stage)
        if fault.kind in COUNTS:
            if not self._spoil(fault):
                fault.outcome = "nothing was read any more"
                return
        elif fault.kind == "server killed":
            self._kill_server(fault)
        elif fault.kind == DISK:
            self._fill_disk(fault)
        elif fault.kind in (RANKS, "job cancelled and submitted again"):
            self._submit_again(fault)
        else:
            self._kill(fault, *self._draw.choice(ranks))
        if fault.kind in (*KILLS, RANKS, DISK):  # who is ending may log still
            wait_for(lambda: not set(ranks) & set(self._ranks(fault.stage)), 60, "the ranks to be gone")
        if fault.kind in STORAGE:  # steps of what was read ahead do not count
            wait_for(lambda: self._storage.is_read or self._ended(fault.stage), BACK, "all to be read again")
            assert self._storage.is_read, "what was spoiled, or nothing at all, was read again"
        before = self._at(fault.stage)
        wait_for(lambda: self._at(fault.stage) > before or self._ended(fault.stage), BACK, "a step beyond the fault")
        if fault.kind in STORAGE:
            assert self._restarts(fault.stage) == restarts, "its job was started again: it did not go on by itself"
        if fault.kind == RANKS:
            now = len(self._ranks(fault.stage))
            assert fault.detail.endswith(f" to {now}") or self._ended(fault.stage), f"{now} ranks train"
        fault.seconds = time.monotonic() - began
        fault.outcome = "went on"

    def _spoil(self, fault: Fault) -> int:
        """Spoil some answers; return how many there were before the stage ended."""
        before, count = self._storage.spoiled, COUNTS[fault.kind]
        self._storage.spoil(fault.kind, count)
        wait_for(lambda: self._storage.spoiled >= before + count or self._ended(fault.stage), NEXT, "so many reads")
        spoiled = self._storage.spoiled - before
        fault.detail = f"{spoiled} answers"
        return spoiled

    def _kill_server(self, fault: Fault) -> None:
        self._storage.kill()
        away = self._draw.uniform(2, 10)
        time.sleep(away)
        self._storage.start()
        fault.detail = f"away for {away:.0f} s"

    def _fill_disk(self, fault: Fault) -> None:
        filler, restarts = self._disk / "filler", self._restarts(fault.stage)
        said, found = len(self._run.log(fault.stage)), []
        try:

            def is_told() -> bool:
                _fill(self._disk, filler)  # again and again: what goes to be rotated away makes room
                found[:] = re.findall(r"^error: (.*make room.*)$", self._run.log(fault.stage)[said:], re.MULTILINE)
                return bool(found)

            wait_for(is_told, 120, "a save to fail")
            self._wait_until_back(fault.stage, restarts)
        finally:
            filler.unlink(missing_ok=True)
        fault.detail = found[0].replace(f"{self._run.run}/", "").partition("; make room")[0]

    def _submit_again(self, fault: Fault) -> None:
        self._run.cancel()
        if fault.kind == RANKS:
            text = self._run.plan.read_text()
            pattern = rf'(name = "{fault.stage}".*\n.*\nranks = )(\d+)'
            before, ranks = re.search(pattern, text)[2], next(self._cycle)
            self._run.plan.write_text(re.sub(pattern, rf"\g<1>{ranks}", text))
            fault.detail = f"{before} to {ranks}"
        self._run.submit()

    def _kill(self, fault: Fault, node: str, rank: int) -> None:
        number = self._run.jobs[fault.stage]
        restarts, cluster, said = self._restarts(fault.stage), self._run.cluster, len(self._run.log(fault.stage))
        if fault.kind == "rank killed":
            fault.detail = f"on {node}"
            os.kill(rank, signal.SIGKILL)
        elif fault.kind == "node killed":
            fault.detail = node
            cluster.kill_node(node)
        elif fault.kind == "job requeued":
            cluster.run("scontrol", "requeue", number)
        else:
            cluster.run("scancel", "--signal=TERM", number)
        self._wait_until_back(fault.stage, restarts)
        if fault.kind == "node killed":
            cluster.start_node(node)
        if fault.kind == "job pre-empted" and not self._ended(fault.stage):
            assert "stopped on request at " in self._run.log(fault.stage)[said:], "its ranks did not save"

    def _restarts(self, stage: str) -> int:
        return int(self._run.shown(stage)["Restarts"])

    def _wait_until_back(self, stage: str, restarts: int) -> None:
        wait_for(
            lambda: self._restarts(stage) > restarts or self._ended(stage), 120, "the job to go back into the queue"
        )

    def _at(self, stage: str) -> int:
        """Return how many samples a stage has behind it, by its log.

        Raises:
            ClusterError: Its job has failed for good.
        """
        record = Record(self._run.run, stage).table
        if record.get("state") == "failed":
            raise ClusterError(f"{stage} failed: {record['reason']}")
        lines = losses(self._run.stage(stage))
        return lines[-1][0] if lines else 0

    def _ended(self, stage: str) -> bool:
        return (self._run.stage(stage) / "result.json").exists()

    def _ranks(self, stage: str) -> list[tuple[str, int]]:
        """Return node and process of each rank of a stage that runs now."""
        found, folder = [], str(self._run.stage(stage))
        for node in self._run.cluster.nodes:
            for pid in self._run.cluster.tasks(node):
                words = _words(pid)
                if "launch.rank" in words and "srun" not in words and any(word.startswith(folder) for word in words):
                    found.append((node, pid))
        return sorted(found)


def _fill(disk: Path, filler: Path) -> None:
    """Leave ``LEFT`` bytes of a disk, if there are more, in a file that grows."""
    free = os.statvfs(disk)
    with open(filler, "ab") as file, suppress(OSError):  # somebody else was faster: then it is full, too
        if (room := free.f_bavail * free.f_bsize - LEFT) > 0:
            os.posix_fallocate(file.fileno(), file.tell(), room)


def _words(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:  # it just ended
        return []
