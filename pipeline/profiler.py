"""A trace of a few steps by torch.profiler, one file a rank, for Perfetto or chrome://tracing."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline import distributed


class Profiler:
    """Records steps; ``step`` is called before every one.

    Args:
        folder: Gets ``rank-R.json.gz``.
        first: Steps of this start before those recorded.
        steps: To record; 0 records none.
    """

    def __init__(self, folder: Path, first: int, steps: int):
        self._folder, self._first, self._last, self._taken = folder, first, first + steps, 0
        self._profile: profile | None = None

    def step(self) -> None:
        """Note that a step begins."""
        if self._taken == self._first < self._last:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], record_shapes=True)
            self._profile.start()
        elif self._taken == self._last and self._profile is not None:
            self._write()
        self._taken += 1

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._write()  # the run may end earlier

    def _write(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profile.export_chrome_trace(str(self._folder / f"rank-{distributed.rank():05d}.json.gz"))
            self._profile = None
