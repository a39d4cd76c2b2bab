"""Mirrors of the metrics for people to look at, on rank 0: TensorBoard, Weights & Biases."""

import sys
import uuid
from pathlib import Path
from typing import Protocol

from pipeline.config import TrainSettings
from shards.atomic import write_text
from shards.errors import UserError

WITHOUT = (
    "warning: track.tensorboard is on, and tensorboard is not installed: the numbers are in metrics.jsonl alone; "
    "pip install tensorboard, or set track.tensorboard = false"
)


class Mirror(Protocol):
    """What shows numbers."""

    def log(self, samples: int, numbers: dict[str, float]) -> None:
        """Show numbers at so many samples consumed."""

    def close(self) -> None:
        """Flush everything."""


def mirrors(settings: TrainSettings, out: Path, start: int) -> list[Mirror]:
    """Return the mirrors that the settings name; TensorBoard only where it is installed, else a warning on stderr.

    Args:
        settings: Of the stage.
        out: Its folder, which keeps their files.
        start: Samples consumed where the run goes on; what was shown after that is replaced, as far as a mirror can.

    Raises:
        UserError: Weights & Biases is set and not installed, or does not let this run in.
    """
    found: list[Mirror] = []
    if settings.track.tensorboard:
        try:
            found.append(TensorBoard(out / "tensorboard", start))
        except ImportError:  # the lines are the truth, and the report draws them
            print(WITHOUT, file=sys.stderr, flush=True)
    if settings.track.wandb is not None:
        try:
            found.append(WeightsAndBiases(settings, out))
        except ImportError:
            raise UserError("track.wandb is set, and wandb is not installed; pip install wandb, or unset it") from None
    return found


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=start + 1)

    def log(self, samples: int, numbers: dict[str, float]) -> None:
        """Show numbers at so many samples consumed."""
        for key, value in numbers.items():
            self._board.add_scalar(key, value, samples)

    def close(self) -> None:
        """Flush everything."""
        self._board.close()


class WeightsAndBiases:
    """A run of a project, the same one after every restart; WANDB_MODE=offline keeps it in the stage's folder."""

    def __init__(self, settings: TrainSettings, out: Path):
        import wandb

        kept = out / "wandb_id"
        if not kept.exists():
            write_text(kept, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=settings.track.wandb, id=kept.read_text(), resume="allow", name=out.name, dir=out,
                config=settings.model_dump(mode="json"), settings=wandb.Settings(console="off", silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:  # of keys and connections
            raise UserError(
                f"track.wandb = {settings.track.wandb!r} cannot be opened: {' '.join(str(error).split())}; run `wandb "
                "login`, set WANDB_API_KEY, set WANDB_MODE=offline to keep it here, or unset track.wandb"
            ) from None
        self._run.define_metric("*", step_metric="samples")  # its own steps never go back

    def log(self, samples: int, numbers: dict[str, float]) -> None:
        """Show numbers at so many samples consumed."""
        self._run.log({"samples": samples, **numbers})

    def close(self) -> None:
        """Flush everything."""
        self._run.finish()
