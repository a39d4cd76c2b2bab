"""A launcher's command, run from here: its ranks are asked to stop, awaited, and their true exit code is found."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from launch.lastwords import LastWords
from launch.rank import DRIVER, ENDED, STOP, code_of_ranks, die_with_parent
from launch.start import Start
from launch.tail import Tail
from pipeline import stop
from shards.atomic import only_one
from shards.errors import TOLD, StoppedOnRequestError
from shards.signals import SIGNALS, leave_closed_terminal

LOOK = 0.1  # seconds
OTHER = 60.0  # seconds to wait for another run of the same stage
LEFT = 900.0  # seconds that ranks whose launcher is gone may take to save and end


class Asked:
    """Notes who asks this process to stop, as long as it is open; ``then`` is called."""

    def __init__(self, then: Callable[[], object] = lambda: None):
        self.signals: set[int] = set()
        self._then = then
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Asked":
        """Begin."""
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        """End, with whoever listened before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signals.add(number)
        leave_closed_terminal()
        self._then()


def drive(command: list[str], start: Start, node: int, tell: Callable[[Start], object] | None = None) -> int:
    """Run a launcher to its end, and the ranks that it started; return why they ended, as an exit code.

    A signal to this process is no signal to the launcher, which would end the ranks in a hurry (torchrun and DeepSpeed
    after 30 seconds) or forget them: rank 0 finds that it is asked to stop, all save, and the launcher sees them end.

    Args:
        command: The launcher's, for this node.
        start: What it is for.
        node: This one. Node 0 says what rank 0 says.
        tell: Called when all is ready for the ranks.
    """
    logs = Path(start.logs)
    logs.mkdir(parents=True, exist_ok=True)
    if node:
        return _drive(command, start, node, tell)
    with only_one(logs / DRIVER, "patchmill run", wait=OTHER, told=True):
        (logs / STOP).touch()
        await_ranks(logs)  # of a run before, which was killed
        for stale in (logs.parent / stop.STOPPED, logs / ENDED, logs / STOP):
            stale.unlink(missing_ok=True)
        try:
            return _drive(command, start, node, tell)
        finally:
            (logs / STOP).unlink(missing_ok=True)


def _drive(command: list[str], start: Start, node: int, tell: Callable[[Start], object] | None) -> int:
    logs = Path(start.logs)
    told = logs / f"launcher-{node}.log"
    words = LastWords([told, *(logs / f"rank-{rank}.log" for rank in range(start.ranks))])
    with Asked(then=(logs / STOP).touch) as asked, open(told, "a", encoding="utf-8") as log:
        if tell:
            tell(start)
        process = subprocess.Popen(
            command, env=_environment(start), cwd=start.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        with Tail(logs / "rank-0.log", node == 0) as tail:
            while process.poll() is None:
                tail.show()
                time.sleep(LOOK)
            if process.returncode:
                (logs / STOP).touch()  # for ranks that it left behind
            await_ranks(logs)
    ended = code_of_ranks(logs)
    if process.returncode == 0 and not (logs / ENDED).exists():  # which a full disk may have left empty
        return 0
    if (logs.parent / stop.STOPPED).exists():
        return StoppedOnRequestError.exit_code
    code = ended or (StoppedOnRequestError.exit_code if asked.signals else 1)
    if code not in TOLD and node == 0:
        print(f"the ranks ended: {words.error()}", file=sys.stderr)
    return code


def await_ranks(logs: Path) -> None:
    """Wait until no rank is left of those that log to a folder; tell on stderr if that takes long.

    Raises:
        UserError: Some are still there after ``LEFT`` seconds.
    """
    with only_one(logs, "rank", wait=LEFT, told=True):  # each has a share in this lock, on whatever node
        pass


def _environment(start: Start) -> dict[str, str]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // start.each))
    return {"OMP_NUM_THREADS": threads, **os.environ}
