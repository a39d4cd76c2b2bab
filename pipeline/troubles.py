"""Steps that were held back: who was in them, and what to do when there are several in a row."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline import distributed
from pipeline.checkpoint import samples_of
from pipeline.config import TrainSettings
from pipeline.window import Taken
from shards.atomic import write_text
from shards.errors import PatchmillError

TRIES = 3  # rollbacks to the same checkpoint; what they did not mend, a fourth would not
HALVINGS = (
    24  # of float16's loss scale in a row, from its largest value to 1; a gradient that overflows then is trouble
)
LEDGER, INTERVALS = "skipped.jsonl", "passed_over.json"


class RollBack(PatchmillError):  # noqa: N818 (a request)
    """Go on from the last checkpoint."""


class Troubles:
    """What is known of the trouble of a run; every rank knows and decides the same.

    Files of the stage: ``skipped.jsonl`` has a line for each step that was held back, with the keys of its samples, and
    ``passed_over.json`` the intervals of samples that are read and not trained on.

    Args:
        settings: Of the stage.
        out: Its folder.
        names: ``tar`` and ``key`` of the samples at positions of the order; None of a stream.
        start: Samples consumed where the run goes on.

    Attributes:
        skipped: Steps of the run that were held back, those among them that a rollback passed over.
        passed_over: Intervals, as ``passed_over.json`` has them.
    """

    def __init__(
        self, settings: TrainSettings, out: Path, names: Callable[[np.ndarray], Iterator[dict]] | None, start: int
    ):
        self._settings, self._out, self._names = settings, out, names
        self._row: list[Taken] = []  # held back one after another, up to now
        self._halvings = 0  # of the loss scale, likewise
        mine = _read(out, start) if distributed.rank() == 0 else ([], 0)
        self.passed_over, self.skipped = distributed.everyone(mine)[0]

    @property
    def now(self) -> bool:
        """Whether the last step was held back: a checkpoint now would be one to go back to, and of no use."""
        return bool(self._row)

    def passes_over(self, samples: int) -> bool:
        """Tell whether the batch that ends at so many samples is not to be trained on."""
        first = samples - self._settings.global_batch  # the batch may be another than that which the interval was of
        return any(first < each["to"] and each["from"] < samples for each in self.passed_over)

    def note(self, taken: Sequence[Taken], checkpoint: Path | None) -> None:
        """Look at a window's steps.

        Args:
            taken: In their order.
            checkpoint: The newest one.

        Raises:
            RollBack: There were too many in a row.
            PatchmillError: The same, and going back is not wanted, did not help before, or there is no place for it.
        """
        for step in taken:
            if self._scales_losses(step) or step.applied:
                if self._too_many():
                    break  # that better ones came later mends nothing
                self._row.clear()
                continue
            self._row.append(step)
            self.skipped += 1
            if distributed.rank() == 0:
                self._write(step)
        if self._too_many():
            self._give_up_or_roll_back(checkpoint)

    def _too_many(self) -> bool:
        return len(self._row) >= self._settings.guard.in_row

    def _scales_losses(self, step: Taken) -> bool:
        """Tell whether float16's loss scaling held a step back: gradients overflow until it has its scale."""
        overflowed = not step.applied and math.isfinite(step.loss) and not math.isfinite(step.grad_norm)
        self._halvings = self._halvings + 1 if overflowed else 0
        return self._settings.engine.precision == "float16" and 0 < self._halvings <= HALVINGS

    def _write(self, step: Taken) -> None:
        first = step.samples - self._settings.global_batch
        names = self._names(np.arange(first, step.samples)) if self._names else ()
        entry = {"from": first, "to": step.samples, "reason": _reason(step), "samples": list(names)}
        with open(self._out / LEDGER, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"warning: step at {step.samples} samples skipped: {entry['reason']}", file=sys.stderr, flush=True)

    def _give_up_or_roll_back(self, checkpoint: Path | None) -> None:
        guard, last = self._settings.guard, self._row[-1]
        told = f"{len(self._row)} steps in a row were skipped up to {last.samples} samples: {_reason(last)}"
        remedy = "lower optim.lr, set optim.clip, or look at the samples in skipped.jsonl, then run again"
        # A stream cannot go back; and what fails before the first checkpoint is no fault of a few batches.
        if guard.then == "stop" or self._names is None or checkpoint is None:
            raise PatchmillError(f"{told}; {remedy}: it goes on from {checkpoint or 'the start'}")
        tries = sum(each["checkpoint"] == checkpoint.name for each in self.passed_over)
        if tries == TRIES:
            raise PatchmillError(f"{told}, after {tries} rollbacks to {checkpoint}; {remedy}")
        # What was wrong began before it showed, and the same batches from the same checkpoint would end the same: so as
        # many batches before are passed over as well, and more at every further try.
        first = self._row[0].samples - self._settings.global_batch
        first = max(samples_of(checkpoint), first - (tries + 1) * (last.samples - first))
        self.passed_over.append(
            {"from": first, "to": last.samples, "checkpoint": checkpoint.name, "reason": _reason(last)}
        )
        if distributed.rank() == 0:
            write_text(self._out / INTERVALS, json.dumps(self.passed_over, indent=1) + "\n")
            print(f"warning: {told}; going back to {checkpoint.name}, and passing over samples {first} to "
                  f"{last.samples}", file=sys.stderr, flush=True)  # fmt: skip
        raise RollBack(told)


def forget(out: Path) -> None:
    """Remove what is known of a run that nothing is left of."""
    for name in (LEDGER, INTERVALS, "quarantine.jsonl"):
        (out / name).unlink(missing_ok=True)


def _read(out: Path, start: int) -> tuple[list[dict], int]:
    """Return the intervals and the number of steps in the ledger, cut where the run goes on: the rest comes again."""
    intervals = json.loads((out / INTERVALS).read_text(encoding="utf-8")) if (out / INTERVALS).is_file() else []
    if not (out / LEDGER).is_file():
        return intervals, 0
    lines = (out / LEDGER).read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and _stays(json.loads(line), start, intervals)]
    if len(kept) < len(lines):
        write_text(out / LEDGER, "".join(kept))
    return intervals, len(kept)


def _stays(entry: dict, start: int, intervals: list[dict]) -> bool:
    return entry["to"] <= start or any(each["from"] <= entry["from"] < each["to"] for each in intervals)


def _reason(step: Taken) -> str:
    for name, value in (("loss", step.loss), ("gradient norm", step.grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return f"loss {step.loss:.4g} or gradient norm {step.grad_norm:.4g} far above those before"
