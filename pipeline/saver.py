"""Saving beside the loop, which waits only until what its rank owns is copied to host memory."""

import copy
import math
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.engines.fragments import Piece
from pipeline.engines.states import FLOAT, checkpoint_bytes
from pipeline.hostcopy import HostCopy
from pipeline.hostmemory import free_memory
from pipeline.mirror import Mirror
from pipeline.watchdog import MIRRORING, SAVING
from shards.errors import PatchmillError

ROOM = 1.25
"""Of the copy's size, the memory that must be free: files that are being written wait in memory for the disk."""


class Saver:
    """Writes a run's checkpoints one at a time, in a thread of each rank; all ranks make the same calls.

    What fails on one rank is raised on all of them: by the next ``save``, by ``wait``, and by ``Lookout.look`` before.

    Args:
        folder: The run's ``checkpoints`` folder.
        shapes: Full shape of every parameter, by name.
        settings: Of the stage.
        keep_every: Samples; the first checkpoint at or after each multiple of it stays for good.
        at: Called with what begins now, in the watchdog's words.

    Raises:
        PatchmillError: There is no room for a checkpoint on the disk.
    """

    def __init__(
        self,
        folder: Path,
        shapes: dict[str, tuple],
        settings: TrainSettings,
        keep_every: int | None = None,
        at: Callable[[str], None] = lambda what: None,
    ):
        self._folder, self._shapes, self._settings = folder, shapes, settings.checkpoint
        self._size = checkpoint_bytes(settings.optim, sum(math.prod(shape) for shape in shapes.values()))
        self._keep_every, self._at = keep_every, at
        self._source = torch.device("cpu") if settings.engine.offload_optimizer else distributed.device()
        self._group = distributed.group_beside()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future[None] | None = None
        self._copy = HostCopy()
        self._asynchronous: bool | None = None if self._settings.asynchronous else False  # None: not known yet
        self._mirror: Mirror | None = None  # rank 0 has it
        checkpoint.together(folder, self._prepare, distributed.rank() == 0)

    def prepare(self) -> None:
        """Begin to take the memory of the copy, so that the first save waits for a copy alone; once, collective.

        Not before the first steps: until then the rest of what training holds is not there, or nobody wrote to it, and
        memory seems to be free that is not.
        """
        if self._asynchronous is None:
            self._asynchronous = self._copy_fits()
            if self._asynchronous:
                self._saving = self._thread.submit(self._reserve)

    def save(self, samples: int, pieces: Iterable[Piece], state: dict[str, Any], best: bool = False) -> Path:
        """Begin to write a checkpoint, as ``checkpoint.save`` does, once the one before is whole; return its path."""
        self._at(SAVING)
        self.prepare()
        self.wait()
        if self._asynchronous:
            pieces = self._copy.take(pieces)
        self._saving = self._thread.submit(self._write, samples, pieces, copy.deepcopy(state), best)
        if not self._asynchronous:
            self.wait()
        return checkpoint.path_of(self._folder, samples)

    def wait(self) -> None:
        """Wait until the last checkpoint is whole; raise what it failed of on any rank."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def finish(self) -> None:
        """Wait until the last checkpoint is whole, and in the mirror, if there is one; raise what either failed of."""
        self._at(SAVING)
        self.wait()
        if self._settings.mirror:
            self._at(MIRRORING)
        checkpoint.together(self._folder, self._finish_mirror, distributed.rank() == 0)

    @property
    def failed(self) -> bool:
        """Whether the last save is known to have failed; ``wait`` raises it."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        if self._settings.mirror:
            self._at(MIRRORING)
        self._thread.shutdown()  # what was begun is written, however the run ends
        if self._saving is not None and self.failed and distributed.rank() == 0:
            print(f"warning: {self._saving.exception()}", file=sys.stderr, flush=True)
        if self._mirror:
            self._mirror.close()

    def _prepare(self) -> None:
        try:
            checkpoint.clear_partial(self._folder)
            checkpoint.check_room(self._folder, self._size)
        except (PatchmillError, OSError):
            self._prune()  # ``keep`` may be less than it was
            checkpoint.check_room(self._folder, self._size)
        if self._settings.mirror:
            self._mirror = Mirror(self._settings.mirror, self._folder, self._settings.keep, self._keep_every)

    def _reserve(self) -> None:
        """Take the memory of the copy; where one rank cannot, all save without one."""
        share, problem = self._size // FLOAT // distributed.world_size(), None
        try:
            self._copy.reserve(share, self._source)
        except (MemoryError, RuntimeError) as error:  # the latter of what cannot be pinned
            problem = f"rank {distributed.rank()}: {error}"
        if problems := [each for each in distributed.everyone(problem, self._group) if each]:
            self._asynchronous, self._copy = False, HostCopy()
            if distributed.rank() == 0:
                print(
                    f"warning: no memory for a copy to save from beside the loop ({problems[0]}): the loop waits for "
                    "each save; take more machines, or set checkpoint.asynchronous = false",
                    file=sys.stderr, flush=True,
                )  # fmt: skip

    def _write(self, samples: int, pieces: Iterable[Piece], state: dict[str, Any], best: bool) -> None:
        path = checkpoint.save(self._folder, samples, pieces, self._shapes, state, best, self._size, self._group)
        checkpoint.together(path, self._saved, distributed.rank() == 0, self._group)

    def _saved(self) -> None:
        if self._mirror:
            self._mirror.bring()
        self._prune(self._mirror.busy() if self._mirror else None)

    def _prune(self, in_use: Path | None = None) -> None:
        """Delete what is of no more use. Trouble with that is told, and tried again after the next save."""
        try:
            checkpoint.prune(self._folder, self._settings.keep, self._keep_every, in_use)
            checkpoint.clear_partial(self._folder)  # what could not be deleted before
        except OSError as error:
            print(
                f"warning: old checkpoints in {self._folder} cannot be deleted: {error}; tried again after the next "
                "save",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _finish_mirror(self) -> None:
        if self._mirror:
            self._mirror.finish()

    def _copy_fits(self) -> bool:
        """Tell whether there is memory for the copies of the ranks on each machine; collective."""
        wanted = ROOM * self._size / distributed.world_size() * len(distributed.ranks_here())
        free = free_memory()
        lacking = [each for each in distributed.everyone((wanted, free)) if each[0] > each[1]]
        if lacking and distributed.rank() == 0:
            wanted, free = lacking[0]
            print(
                f"warning: saving beside the loop wants {wanted / 1e9:.3g} GB of a machine's memory, for a copy and "
                f"for what is on its way to the disk, and {free / 1e9:.3g} GB are free: the loop waits for each save; "
                "take more machines, or set checkpoint.asynchronous = false",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        return not lacking
