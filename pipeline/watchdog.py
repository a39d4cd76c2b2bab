"""A step that takes too long ends the job, each rank having written down where it is."""

import faulthandler
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

from pipeline import distributed, liveness

T = TypeVar("T")
STARTING, WAITING, TRAINING, SAVING, EVALUATING = "starting", "waiting for data", "training", "saving", "evaluating"
MIRRORING = "at the mirror"  # which has no limit: stores end by themselves what they hear nothing of
LONGER = 6  # times as long as a step may saving and evaluating take, and all until the first step, which may compile
GRACE = 5.0  # seconds for whatever may hang as well
SHOWN = 20  # ranks


class Watchdog:
    """Watches one rank's main thread, which says with ``at`` what it begins to do; ends all ranks together.

    Args:
        folder: Gets ``hang-samples-N/rank-R.txt``: what this rank was doing, what it reads, the stacks of its threads.
        limit: Seconds that waiting for data, or a step, may take.
        rank: Of this process.
        awaited: Names the tars that the loader waits for.
    """

    def __init__(self, folder: Path, limit: float, rank: int, awaited: Callable[[], list[str]]):
        self._folder, self._limit, self._rank, self._awaited = folder, limit, rank, awaited
        self._alive, self._closed, self._trained = distributed.alive, threading.Event(), False
        self.at(STARTING, 0)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, what: str, samples: int) -> None:
        """Note what begins now, at so many samples consumed."""
        longer = not self._trained or what in (SAVING, EVALUATING)
        if not self._trained:  # at the start, and again when the engine has made groups
            distributed.let_collectives_take_long()
        self._trained = self._trained or what == TRAINING
        limit = math.inf if what == MIRRORING else self._limit * (LONGER if longer else 1)
        self._now = what, samples, time.monotonic(), limit

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            # No thread of Python's runs while C code keeps Python's lock; this one does, if it is not put off again.
            faulthandler.dump_traceback_later(self._limit * 2 * LONGER, exit=True, file=sys.__stderr__ or 2)
            what, samples, since, limit = self._now
            seconds = time.monotonic() - since
            hang = self._alive.hang if self._alive else ""
            if seconds > limit and not hang:
                hang = f"{samples} {seconds:.0f}"
                hang = _attempt(partial(self._alive.tell_hang, hang), hang) if self._alive else hang
            if hang:
                self._end(what, seconds, *map(int, hang.split()))

    def _end(self, what: str, seconds: float, samples: int, of_first: int) -> NoReturn:
        """Write where this rank is, and end it; ``samples`` and ``of_first`` (seconds) are of who saw it first."""
        mine = f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}: {what} for {seconds:.0f} s"
        tars: list[str] = _attempt(self._awaited, []) if what == WAITING else []
        mine += f", of {', '.join(tars[:3])}{f' and {len(tars) - 3} more' if tars[3:] else ''}" if tars else ""
        folder = self._folder / f"hang-samples-{samples:012d}"
        written = _attempt(partial(_write, folder / f"rank-{self._rank:05d}.txt", mine), False)
        if self._alive:
            # Until all have heard and written. Rank 0 ends first: a launcher may end all others when one ends.
            time.sleep((liveness.BEAT + GRACE) * (1 if self._rank == 0 else 2))
        lines = _attempt(partial(_first_lines, folder), [mine]) if self._rank == 0 and written else [mine]
        silent = distributed.world_size() - len(lines) if self._rank == 0 else 0
        told = (
            f"error: no step for {of_first} s at {samples} samples (watchdog = {self._limit:g} seconds); the stacks "
            f"{'are in' if written else 'could not be written to'} {folder}; run again to go on",
            *sorted(lines, key=lambda each: WAITING not in each)[:SHOWN],  # the others wait for these
            *([f"nothing of {silent} ranks"] if silent > 0 else ()),
        )  # fmt: skip
        _attempt(lambda: print(*told, sep="\n  ", file=sys.stderr, flush=True), None)
        os._exit(1)


def _attempt(action: Callable[[], T], otherwise: T) -> T:
    """Return what an action returns; or something else, where it fails or takes longer than GRACE seconds."""
    found = []

    def act() -> None:
        with suppress(Exception):
            found.append(action())

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(GRACE)
    return found[0] if found else otherwise


def _write(path: Path, line: str) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        print(line, flush=True, file=file)
        faulthandler.dump_traceback(file, all_threads=True)
    return True


def _first_lines(folder: Path) -> list[str]:
    return [path.read_text(encoding="utf-8").split("\n")[0] for path in sorted(folder.iterdir())]
