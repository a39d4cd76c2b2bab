"""Runs independent jobs on several processes, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

from shards.errors import PatchmillError

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def run_jobs(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Result]]:
    """Yield each job with its result as it ends, in any order; a single worker is this process itself.

    Args:
        function: A function of a module: the worker processes import it.
        jobs: Taken one by one as workers get free, so that a long list need not be in memory.
        workers: Number of processes.

    Raises:
        PatchmillError: A worker died. Errors of a job are raised as they are; running jobs are then finished, not
            begun ones dropped.
    """
    if workers <= 1:
        yield from ((job, function(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    running: dict[Future, Job] = {}
    waiting = iter(jobs)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        try:
            while True:
                for job in waiting:
                    running[pool.submit(function, job)] = job
                    if len(running) > workers:  # one more than can run: no worker waits for us
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise PatchmillError(
                "a worker process died (out of memory?); run the same command again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process when its parent is killed: an orphan would write on under the feet of the next try."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel
    threading.Thread(target=lambda: (connection.wait([sentinel]), os._exit(1)), daemon=True).start()
