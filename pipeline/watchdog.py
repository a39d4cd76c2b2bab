"""A step that takes too long ends the job, each rank having written down where it is."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

STARTING, FIRST, WAITING, TRAINING = "starting", "in the first step", "waiting for data", "training"
SAVING, EVALUATING = "saving", "evaluating"
LONGER = {STARTING: 6, FIRST: 6, SAVING: 6, EVALUATING: 6}  # times as long as a step may these take
GRACE = 5.0  # seconds for the other ranks, which hang as well, to write where they are
SHOWN = 20  # ranks


class Watchdog:
    """Watches one rank's main thread, which says with ``at`` what it begins to do.

    Args:
        folder: Gets ``hang-samples-N/rank-R.txt``: what this rank was doing, what it reads, the stacks of its threads.
        limit: Seconds that waiting for data, or a step, may take.
        rank: Of this process.
        awaited: Names the tars that the loader waits for.
    """

    def __init__(self, folder: Path, limit: float, rank: int, awaited: Callable[[], list[str]]):
        self._folder, self._limit, self._rank, self._awaited = folder, limit, rank, awaited
        self._closed, self._trained = threading.Event(), False
        self.at(STARTING, 0)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def at(self, what: str, samples: int) -> None:
        """Note what begins now, at so many samples consumed."""
        if what == TRAINING and not self._trained:
            what, self._trained = FIRST, True  # it may compile
        self._now = what, samples, time.monotonic()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._limit / 4)):
            # No thread of Python's runs while C code keeps Python's lock; this one does, if it is not put off again.
            faulthandler.dump_traceback_later(self._limit * 2 * max(LONGER.values()), exit=True, file=sys.__stderr__)
            what, samples, since = self._now
            seconds = time.monotonic() - since
            if seconds > self._limit * LONGER.get(what, 1):
                self._end(what, samples, seconds)

    def _end(self, what: str, samples: int, seconds: float) -> None:
        folder = self._folder / f"hang-samples-{samples:012d}"
        folder.mkdir(parents=True, exist_ok=True)
        line = f"rank {self._rank} on {socket.gethostname()}, process {os.getpid()}: {what} for {seconds:.0f} s"
        with open(folder / f"rank-{self._rank:05d}.txt", "w", encoding="utf-8") as file:
            if what == WAITING:
                # Asked in a thread: whoever is asked may hang.
                asked = threading.Thread(target=lambda: tars.extend(self._awaited()), daemon=True)
                tars: list[str] = []
                asked.start()
                asked.join(GRACE)
                line += f", of {', '.join(tars[:3])}{f' and {len(tars) - 3} more' if tars[3:] else ''}" if tars else ""
            print(line, flush=True, file=file)
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(GRACE)
        if self._closed.is_set():
            return
        if self._rank == 0:
            lines = [path.read_text(encoding="utf-8").split("\n")[0] for path in sorted(folder.iterdir())]
            lines.sort(key=lambda each: WAITING not in each)  # the others wait for these
            print(
                f"error: no step for {seconds:.0f} s at {samples} samples (watchdog = {self._limit:g} seconds); the "
                f"stacks of {len(lines)} ranks are in {folder}; run again to go on",
                *lines[:SHOWN], sep="\n  ", file=sys.stderr, flush=True,
            )  # fmt: skip
        os._exit(1)
