"""Runs independent jobs on several processes, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import TypeVar

from shards.errors import PatchmillError
from shards.signals import SIGNALS

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
    with deaf():
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent)
    with pool:
        try:
            while True:
                for job in waiting:
                    with deaf():
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


@contextmanager
def deaf() -> Iterator[None]:
    """Let processes that are started in here not hear ``SIGNALS``, from their first moment on: by what they inherit.

    Slurm sends them to every process of a step. They are for the one that started the others: it saves, and ends them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # starting it lets some of them through again
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """End this process when its parent is killed, whom it would write on under the feet of the next try, or says so.

    It was started ``deaf``; a SIGTERM of its parent's, which a pool sends when it breaks, is the one that it heeds.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    threading.Thread(target=_obey, args=[parent.pid], daemon=True).start()


def _obey(parent: int) -> None:
    while (heard := signal.sigwaitinfo(SIGNALS)).si_pid != parent or heard.si_signo != signal.SIGTERM:
        pass
    os._exit(1)
