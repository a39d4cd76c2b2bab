"""What a run says while it runs: JSON lines (the truth), what mirrors them, and a progress line on stderr."""

import atexit
import datetime
import json
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.tracking import Mirror
from shards.atomic import write_text

BAR = 12  # columns


class Telemetry:
    """Rank 0 writes ``metrics.jsonl``, and shows a progress line and mirrors of the file.

    A resumed run cuts what was logged after its checkpoint, so the file holds every step once.

    Args:
        out: Folder of the stage.
        title: Of the progress line.
        total: Samples of the whole stage.
        start: Samples consumed where it goes on.
        mirrors: That show the numbers too.
    """

    def __init__(self, out: Path, title: str, total: int, start: int, mirrors: Sequence[Mirror] = ()):
        self.path = out / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["samples"] <= start]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self.mirrors = mirrors
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=BAR), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.progress.add_task(title, total=total, completed=start, text="")
        self.title, self.total, self.spoke = title, total, 0.0
        self.progress.start()
        atexit.register(self.progress.stop)  # an error must not leave the terminal without a cursor

    def log(self, samples: int, values: dict[str, Any]) -> None:
        """Write one line of metrics at ``samples`` consumed."""
        self.file.write(json.dumps({"samples": samples, **values}) + "\n")
        self.file.flush()
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for mirror in self.mirrors:
            mirror.log(samples, numbers)

    def show(self, samples: int, values: dict[str, Any]) -> None:
        """Move the progress line; where stderr is no terminal, say it as a plain line every 15 seconds.

        Args:
            samples: Consumed.
            values: As ``Window.measure`` returns them, ``val_top1`` or None, and what probes found.
        """
        speed = values["images_per_second"]  # 0 where all batches were passed over
        text = _in_words(values, (self.total - samples) / speed if speed else 0.0)
        room = self.progress.console.width - len(self.title) - BAR - len("  100% ")
        self.progress.update(self.task, completed=samples, text=_folded(text, room))
        if self.progress.disable and (time.monotonic() - self.spoke > 15 or samples >= self.total):
            self.spoke = time.monotonic()
            print(f"{self.title}: {100 * samples / self.total:.0f}% {'  '.join(text)}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush everything."""
        self.progress.stop()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        for mirror in self.mirrors:
            mirror.close()


def _in_words(values: dict[str, Any], seconds_left: float) -> list[str]:
    """Say what a log line says; troubles only where there are any."""
    left = datetime.timedelta(seconds=round(seconds_left))
    text = ["no step taken" if values["loss"] is None else f"loss {values['loss']:.3f}"]
    if values["val_top1"] is not None:
        text.append(f"top-1 {values['val_top1']:.1%}")
    text += [f"{key.removeprefix('probe_')} {value:.1%}" for key, value in values.items() if key.startswith("probe_")]
    text += [f"{values['images_per_second']:,.0f} images/s", f"{left} left", f"waiting {values['data_wait']:.0%}"]
    speed = values["mb_per_second"]
    text += [f"decoding {values['decode_share']:.0%}", f"{speed:,.0f} MB/s" if speed >= 10 else f"{speed:.1f} MB/s"]
    if "cache_hit_share" in values:
        text.append(f"cache {values['cache_hit_share']:.0%}")
    if values["skipped"]:
        text.append(f"skipped {values['skipped']:,}")
    if values["retries"]:
        text.append(f"retried {values['retries']:,}")
    if values["quarantined"]:
        text.append(f"quarantined {values['quarantined']:,}")
    return text


def _folded(text: list[str], width: int) -> str:
    """Put the pieces on as few lines as the width allows, none of them broken."""
    joined = "  ".join(piece.replace(" ", "\xa0") for piece in text)
    lines = textwrap.wrap(joined, max(width, 1), break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\xa0", " ")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; one that a kill cut short, or a disk damaged, is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and type(line.get("samples")) is int:
                lines.append(line)
    return lines
