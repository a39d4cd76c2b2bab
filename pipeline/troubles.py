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
    """

    def __init__(self, settings: TrainSettings, out: Path, names: Callable[[np.ndarray], Iterator[dict]] | None):
        self._settings, self._out, self._names = settings, out, names
        self._row: list[Taken] = []  # held back one after another, up to now
        self.skipped = 0
        path = out / "passed_over.json"
        mine = json.loads(path.read_text()) if distributed.rank() == 0 and path.is_file() else []
        self.passed_over: list[dict] = distributed.everyone(mine)[0]

    @property
    def now(self) -> bool:
        """Whether the last step was held back: a checkpoint now would be one to go back to, and of no use."""
        return bool(self._row)

    def passes_over(self, samples: int) -> bool:
        """Tell whether the batch that ends at so many samples is not to be trained on."""
        return any(each["from"] < samples <= each["to"] for each in self.passed_over)

    def note(self, taken: Sequence[Taken], checkpoint: Path | None) -> None:
        """Look at a window's steps.

        Args:
            taken: In their order.
            checkpoint: The newest one.

        Raises:
            RollBack: There were too many in a row, and there is a checkpoint to try again from.
            PatchmillError: There were too many in a row.
        """
        for step in taken:
            if step.applied or self._scales_losses(step):
                self._row.clear()
                continue
            self._row.append(step)
            self.skipped += 1
            if distributed.rank() == 0:
                self._write(step)
        if len(self._row) >= self._settings.guard.in_row:
            self._give_up_or_roll_back(checkpoint)

    def _scales_losses(self, step: Taken) -> bool:
        """Tell whether it is float16's loss scaling that held a step back: it is looking for its scale."""
        return self._settings.engine.precision == "float16" and math.isfinite(step.loss)

    def _write(self, step: Taken) -> None:
        first = step.samples - self._settings.global_batch
        names = self._names(np.arange(first, step.samples)) if self._names else ()
        entry = {"from": first, "to": step.samples, "reason": _reason(step), "samples": list(names)}
        with open(self._out / "skipped.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(f"warning: step at {step.samples} samples skipped: {entry['reason']}", file=sys.stderr, flush=True)

    def _give_up_or_roll_back(self, checkpoint: Path | None) -> None:
        guard, last = self._settings.guard, self._row[-1]
        told = f"{len(self._row)} steps in a row were skipped up to {last.samples} samples: {_reason(last)}"
        remedy = "lower optim.lr, set optim.clip, or look at the samples in skipped.jsonl, then run again"
        if guard.then == "stop" or checkpoint is None:
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
            write_text(self._out / "passed_over.json", json.dumps(self.passed_over, indent=1) + "\n")
            print(f"warning: {told}; going back to {checkpoint.name}, and passing over samples {first} to "
                  f"{last.samples}", file=sys.stderr, flush=True)  # fmt: skip
        raise RollBack(told)


def _reason(step: Taken) -> str:
    for name, value in (("loss", step.loss), ("gradient norm", step.grad_norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    return f"loss {step.loss:.4g} or gradient norm {step.grad_norm:.4g} far above those before"
