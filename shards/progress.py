"""The progress bar of everything that goes through a data set: images and bytes a second, time left, rejected."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ImageProgress:
    """A bar on stderr that counts images; a context manager.

    Args:
        doing: Such as ``building``.
        total: Images there are to do; None if nobody knows.
        done: Images that an earlier try did.
        rejected: The word for what is counted as bad.
        show: False to show nothing.
    """

    def __init__(self, doing: str, total: int | None, done: int = 0, rejected: str = "rejected", show: bool = True):
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )
        self._task = self._bar.add_task(doing, total=total, completed=done, speed="")
        self._word = rejected
        self._start = time.monotonic()
        self._images = self._bytes = self._rejected = 0

    def __enter__(self) -> "ImageProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, images: int, bytes: int, rejected: int = 0) -> None:
        """Count what is done, in images and their bytes."""
        self._images += images
        self._bytes += bytes
        self._rejected += rejected
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = f"{self._images / seconds:,.0f} images/s {self._bytes / seconds / 1e6:,.0f} MB/s"
        if self._rejected:
            speed += f", {self._rejected:,} {self._word}"
        self._bar.update(self._task, advance=images, speed=speed)
