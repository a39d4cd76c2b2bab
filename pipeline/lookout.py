"""Every few seconds all ranks look up together: was one of them asked to stop, is a save due by the clock?"""

import time
from collections.abc import Callable
from typing import NamedTuple

from pipeline import distributed, stop
from pipeline.saver import Saver

SECONDS = 5.0
"""Between two looks. A scheduler that is about to kill a job leaves it 30 at the least."""


class Seen(NamedTuple):
    """What all ranks see alike.

    Attributes:
        stop: One of them was asked to stop.
        save: So many minutes have gone since the last save.
    """

    stop: bool
    save: bool


class Lookout:
    """Counts steps, since ranks that looked at their own clocks would not look at the same step.

    Args:
        minutes: From the end of one pause for a save to the next; None: the clock asks for none.
        clock: Seconds.
        saver: Whose saves may have failed.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic, saver: Saver | None = None):
        self._minutes, self._clock, self._saver = minutes, clock, saver
        self._saved = self._looked = clock()
        self._steps, self._until = 0, 1

    def look(self, now: bool = False) -> Seen:
        """Look, at the end of a step, if it is time or ``now``; collective then, and every rank must ask alike.

        Raises:
            PatchmillError: On all ranks, what a save in the background failed of on one of them.
        """
        self._steps += 1
        if self._steps < self._until and not now:
            return Seen(False, False)
        clock = self._clock()
        failed = self._saver is not None and self._saver.failed
        mine = [float(stop.asked()), float(failed), clock - self._looked, clock - self._saved]
        asked, failed, since_look, since_save = distributed.gather_floats(mine).max(axis=0).tolist()
        if failed and self._saver is not None:
            self._saver.wait()  # it has failed on all, or is about to
        # No more than twice as many steps as before: the first ones may have been quick by chance.
        fitting = self._steps * SECONDS / max(since_look, 1e-3)
        self._until, self._steps, self._looked = max(1, int(min(2 * self._steps, fitting))), 0, clock
        return Seen(asked > 0, self._minutes is not None and since_save >= 60 * self._minutes)

    def saved(self) -> None:
        """Begin to count the minutes anew."""
        self._saved = self._clock()
