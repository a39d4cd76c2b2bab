"""If one rank dies, the others learn which and why, and end: no library tells them, and they would wait for ever.

Every rank gives a sign of life through the process group's store; rank 0 sees who stopped giving it and says so there,
as does a rank that ends by an error. All read it. A rank that hangs is told of in the same way (``pipeline.watchdog``).
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed as dist

from shards.errors import PatchmillError, StoppedOnRequestError

BEAT = 5.0  # seconds between two signs of life
GONE = 30.0  # seconds without one, and a rank is dead
GRACE = 10.0  # seconds to end by itself, as a rank does that has the same error or none
DONE = "done"
_OF_OTHERS = ("gloo", "nccl", "connection", "peer", "socket", "store")  # in the words of an error of a collective


class Liveness:
    """Signs of life of a rank, given by a thread; made by all ranks together, with ``with`` around what they do.

    Args:
        store: That of torch of the process group; a connection of its own is made to it.
        rank: Of this process.
        world_size: Number of ranks.
        who: This rank in words.

    Attributes:
        hang: What is told of a hang of any rank, if there is one.
    """

    def __init__(self, store: Any, rank: int, world_size: int, who: str):
        self._store = dist.PrefixStore("alive", store.clone())
        self._rank, self._who = rank, who
        self._seen = {other: (b"", 0) for other in range(1, world_size)} if rank == 0 else {}
        self._beats, self._ended, self._reason, self.hang = 0, threading.Event(), "", ""
        self._store.set(f"who/{rank}", who)
        self._beat()
        dist.barrier()  # everybody's first beat is there to be looked at
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

    def __enter__(self) -> "Liveness":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        failed = error is not None and not isinstance(error, (StoppedOnRequestError, SystemExit))
        of_others = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _OF_OTHERS)
        if of_others:
            self._wait_for_the_reason()
        elif failed:
            self._tell(f"{self._who} ended: {error or type(error).__name__}")
        self._ended.set()
        self._thread.join(GRACE)
        self._try(self._done)
        if failed:
            self._linger()
        if of_others:
            raise PatchmillError(f"{self._reason or 'the ranks lost each other'}; run again to go on") from error

    def tell_hang(self, hang: str) -> str:
        """Let all ranks know of a hang, and return what they know: the first to tell counts."""
        return self._store.compare_set("hang", "", hang).decode()

    def _watch(self) -> None:
        silent = 0.0
        while not self._ended.wait(BEAT):
            silent = 0.0 if self._try(self._beat) and self._try(self._look) else silent + BEAT
            if silent >= GONE:
                self._reason = "rank 0 or its machine died: the store of the ranks is gone"
            if self._reason and not self._ended.wait(GRACE):
                _end(self._reason)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _done(self) -> None:
        self._store.set(f"beat/{self._rank}", DONE)

    def _look(self) -> None:
        """See whether the others live (rank 0), and whether anybody says that the job is over (all)."""
        for other, (last, misses) in self._seen.items():
            beat = self._store.get(f"beat/{other}")
            misses = misses + 1 if beat == last and beat != DONE.encode() else 0
            self._seen[other] = beat, misses
            if misses * BEAT >= GONE:
                who = self._store.get(f"who/{other}").decode()
                self._tell(f"{who} died: no sign of life for {misses * BEAT:.0f} s; its log may say why")
        if self._store.check(["hang"]):
            self.hang = self._store.get("hang").decode()
        if self._store.check(["end"]):
            self._reason = self._store.get("end").decode()
            self._done()

    def _tell(self, reason: str) -> None:
        """Let all ranks know why the job is over; the first reason counts."""
        self._try(lambda: self._store.compare_set("end", "", reason))

    def _wait_for_the_reason(self) -> None:
        """Wait until it is known which rank's end this rank's collective failed of."""
        deadline = time.monotonic() + GONE + 5 * BEAT
        while not self._reason and time.monotonic() < deadline:
            time.sleep(BEAT / 2)

    def _linger(self) -> None:
        """On rank 0, whose process has the store: stay until the others have read why the job is over."""
        deadline, left = time.monotonic() + 3 * BEAT, set(self._seen)
        while left and time.monotonic() < deadline:
            left -= {other for other in left if self._store.get(f"beat/{other}") == DONE.encode()}
            time.sleep(BEAT / 50)

    @staticmethod
    def _try(action: Callable[[], object]) -> bool:
        try:
            action()
        except RuntimeError:  # DistNetworkError and its like: the store is gone
            return False
        return True


def _end(reason: str) -> NoReturn:
    """End a process whose main thread waits for a rank that will not come."""
    print(f"error: {reason}; run again to go on", file=sys.stderr, flush=True)
    os._exit(1)
