"""Stopping on request: a signal sets a flag, and all ranks agree on it between two steps."""

import json
import signal
from pathlib import Path
from types import FrameType

from pipeline import distributed
from shards.atomic import write_text
from shards.errors import StoppedOnRequestError, UserError
from shards.signals import SIGNALS, leave_closed_terminal

STOPPED = "stopped.json"
"""In a stage's folder: where it was stopped on request. Launchers lose exit codes."""

_asked = False


def listen() -> None:
    """Let SIGTERM, SIGUSR1, SIGUSR2, SIGHUP and Ctrl-C ask for a stop; the handler saves nothing, it notes it."""
    for number in SIGNALS:
        signal.signal(number, _note)


def asked() -> bool:
    """Return whether this rank was asked to stop."""
    return _asked


def stopped(out: Path, samples: int, checkpoint: Path | None) -> StoppedOnRequestError:
    """Return the error that ends a run between two steps, noted in ``out/stopped.json``."""
    if distributed.rank() == 0:
        note = {"samples": samples, "checkpoint": checkpoint and str(checkpoint)}
        write_text(out / STOPPED, json.dumps(note))
    where = f"saved in {checkpoint}" if checkpoint else "before the first checkpoint"
    return StoppedOnRequestError(f"stopped on request at {samples} samples, {where}; run again to go on")


def ended(data: object, samples: int, total: int, checkpoint: Path) -> UserError:
    """Return the error that ends a run whose data ended before it did."""
    return UserError(
        f"{data} ended at {samples} of {total} samples, saved in {checkpoint}; give it more and run again, or set a "
        "shorter duration"
    )


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = True
    leave_closed_terminal()
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means it
