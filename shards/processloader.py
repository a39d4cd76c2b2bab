"""A loader in a process of its own, so that its Python never holds up the training step's.

There is no second loader: the process has a ``Loader``, and what is called here is called there. A batch is handed out
there when it is asked for here, made ahead as always: so the state there is the state. Images stay where they were
made, in memory that both processes have (shards/batchmemory.py).
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from shards.batch import Batch
from shards.batchmemory import Borrower, Lender, Lent
from shards.dataset import Dataset
from shards.errors import PatchmillError, UserError
from shards.loader import Loader
from shards.meter import Counts
from shards.mixture import Mixture
from shards.workers import deaf, end_with_parent

_PATIENCE = 5.0  # seconds for the process to end by itself


def _of_loader(name: str, meaning: str) -> property:
    """Return a property that is an attribute of the loader in the process."""

    def read(self: "ProcessLoader") -> Any:
        return self._call("__getattribute__", name)

    def write(self: "ProcessLoader", value: Any) -> None:
        self._call("__setattr__", name, value)

    return property(read, write, doc=meaning)


class ProcessLoader:
    """A ``Loader`` that runs in another process: the same batches, state and files.

    A batch's images are memory that both processes have; it serves another batch when no reference to them is left.
    The process ends with this object, and when its parent ends, however that happens. It imports the parent's main
    module, which must not train then: ``if __name__ == "__main__":``.

    Args:
        dataset: As for ``Loader``; the process opens it again.
        register: Called with the memory of batches, uint8 [bytes], when it is new; for page-locking.
        **options: Of ``Loader``, without ``allocate``. A transform of yours must be a class or function of a module.

    Raises:
        UserError: As ``Loader``; the transform cannot be sent to a process.
        PatchmillError: From any method: the process ended.
    """

    samples = _of_loader("samples", "Global positions delivered.")
    global_batch = _of_loader("global_batch", "Samples a step over all ranks; to be set between two batches.")
    stop = _of_loader("stop", "The batch that reaches this many samples is the last; None: no batch is.")
    replaced = _of_loader("replaced", "Samples of this rank that a stand-in replaced.")

    def __init__(
        self, dataset: Dataset | Mixture, *, register: Callable[[np.ndarray], None] | None = None, **options: Any
    ):
        try:
            packed = pickle.dumps((dataset, options))
        except Exception as error:  # of any kind: a lambda, a lock, what the transform's own class raises
            raise UserError(
                f"the loader cannot go into a process of its own: {error}; define the transform at the top of a "
                "module, or use a Loader"
            ) from error
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(3)]
        (calls, steps, memory), theirs = zip(*pipes, strict=True)
        process = context.Process(target=_run, args=(*theirs, os.getcwd(), packed), name="decode", daemon=True)
        with deaf():
            process.start()
        for end in theirs:
            end.close()  # so that nobody has them but the process, and what it leaves open ends with it
        self._end = weakref.finalize(self, _end, process, calls, steps, memory)
        atexit.register(self._end)  # before multiprocessing waits for it
        self._process, self._call, self._step = process, _Line(calls, process), _Line(steps, process)
        self._borrower, self._iterations = Borrower(memory, register), count()
        self._call()  # until the loader is made

    def __iter__(self) -> Generator[Batch]:
        iteration = next(self._iterations)
        try:
            while found := self._step("next", iteration, self._borrower.let_go()):
                images, labels, positions = found
                yield Batch(self._borrower.array(images), labels, positions)
        finally:
            if self._process.is_alive():
                self._step("close", iteration)

    def __len__(self) -> int:
        """Return how many batches iterating gives from here on; without ``stop``, a TypeError."""
        return self._call("__len__")

    def counts(self) -> Counts:
        """Return what was counted since the loader was made; what was decoded ahead counts already."""
        return self._call("counts")

    def awaited(self) -> list[str]:
        """Return the tars of the samples that the next batch waits for, if somebody waits for it; from any thread."""
        return self._call("awaited")

    def state_dict(self) -> dict:
        """Return where the stream stands, as ``Loader.state_dict``; from any thread."""
        return self._call("state_dict")

    def load_state_dict(self, state: dict, allow_decoder_change: bool = False) -> None:
        """Go on where a stream stood, of a loader of either kind; raises as ``Loader.load_state_dict``."""
        self._call("load_state_dict", state, allow_decoder_change)

    def close(self) -> None:
        """End the process; without it, that is done when nobody has the loader any more."""
        self._end()


class _Line:
    """Calls to the process through a pipe, one at a time."""

    def __init__(self, connection: Connection, process: BaseProcess):
        self._connection, self._process, self._one = connection, process, threading.Lock()

    def __call__(self, *call: Any) -> Any:
        """Call a function there, or wait for an answer only: what it returns is returned, what it raises is raised."""
        with self._one:
            try:
                if call:
                    self._connection.send(call)
                good, result = self._connection.recv()
            except (EOFError, OSError) as error:
                self._process.join(_PATIENCE)
                raise PatchmillError(f"the decode process {_fate(self._process.exitcode)}") from error
            except BaseException:  # Ctrl-C: nobody would know what the next answer is to
                self._process.kill()
                self._process.join()
                raise
        if not good:
            raise result
        return result


def _fate(code: int | None) -> str:
    if code == 0:
        return "has ended, since the loader was closed; make another one"
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name} (out of memory?); run again, with more memory if so"
    return f"ended with exit code {code}; see what it said before that"


def _end(process: BaseProcess, *connections: Connection) -> None:
    for connection in connections:
        connection.close()
    process.join(_PATIENCE)
    if process.is_alive():  # it waits for a store
        process.kill()
        process.join()


# ---- what runs in the process


def _run(calls: Connection, steps: Connection, memory: Connection, folder: str, packed: bytes) -> None:
    end_with_parent()
    try:
        os.chdir(folder)
        lender = Lender(memory)
        dataset, options = pickle.loads(packed)
        loader = Loader(dataset, allocate=lender.array, **options)
    except Exception as error:  # noqa: BLE001 (goes to the parent)
        calls.send((False, _portable(error)))
        return
    calls.send((True, None))
    threading.Thread(target=_serve, args=(calls, partial(_call, loader)), daemon=True).start()
    iterators: dict[int, Any] = defaultdict(lambda: iter(loader))

    def step(name: str, iteration: int, let_go: Sequence[int] = ()) -> tuple[Lent, np.ndarray, np.ndarray] | None:
        lender.take_back([*let_go])
        if name == "close":
            iterators.pop(iteration).close()
        elif batch := next(iterators[iteration], None):
            return lender.lend(batch.images), batch.labels, batch.positions
        return None

    _serve(steps, step)
    for each in iterators.values():
        each.close()


def _call(loader: Loader, name: str, *arguments: Any) -> Any:
    return getattr(loader, name)(*arguments)


def _serve(connection: Connection, function: Callable) -> None:
    """Answer calls until the other end is closed."""
    with suppress(EOFError, OSError):
        while True:
            given = connection.recv()
            try:
                answer = True, function(*given)
            except Exception as error:  # noqa: BLE001 (goes to the parent)
                answer = False, _portable(error)
            connection.send(answer)


def _portable(error: Exception) -> Exception:
    """Return an error as it can be sent: as it is, if that comes through, and where it happened, if that is of use."""
    if not isinstance(error, PatchmillError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 (whatever its own class raises)
        return PatchmillError(f"{type(error).__name__}: {error}")
