"""What a training stage will cost, before anything of it is there."""

from pathlib import Path
from typing import Any

from pipeline.config import TrainSettings
from pipeline.data import training_set
from pipeline.flops import cost_of
from pipeline.schedule import Schedule
from pipeline.weights import Weights, resolve_model
from shards.dataset import Dataset
from shards.errors import UserError
from shards.tarstream import is_stream


def estimate_model(model: dict[str, Any], samples: int | None, hidden: float = 0.5) -> dict[str, Any]:
    """Return what a model costs, and a training of it on so many samples, if that is told.

    Args:
        model: What ``create_model`` takes, name included.
        samples: Length of the training; None for none.
        hidden: Share of the patches that are corrupted, where ``model`` has a ``patch_target``, or masked, where it has
            a decoder.

    Returns:
        ``model``, ``parameters``, ``forward_macs`` and ``forward_flops`` of one image; ``samples`` and ``exaflops`` of
        the training (forward and backward).
    """
    cost = cost_of(**model, hidden=hidden)
    found = {
        "model": model["name"], "parameters": cost.parameters, "forward_macs": cost.macs, "forward_flops": cost.flops,
    }  # fmt: skip
    if samples is not None:
        found |= {"samples": samples, "exaflops": cost.training_flops(samples) / 1e18}
    return found


def estimate_stage(settings: TrainSettings, classes: int | None, epoch: int | None) -> dict[str, Any]:
    """Return what ``estimate_model`` does for a training stage.

    Args:
        settings: The stage.
        classes: How many there are; None asks the data set.
        epoch: Samples of an epoch; None asks the data set, if that is what the stage's duration is in.

    Raises:
        UserError: The data or the weights that would tell are not there.
    """
    in_epochs = "epoch" in settings.duration
    if classes is None or (in_epochs and epoch is None):
        known_classes, known_epoch = _ask_data(settings)
        classes, epoch = classes or known_classes, epoch or known_epoch
    made = settings.init is not None and (settings.model.name is None or Path(settings.init).exists())
    init = Weights(settings.init) if made else None  # another stage may have yet to make them
    model = resolve_model(settings, init, classes)
    # No other length than the duration changes what a stage costs.
    total = Schedule.of(settings, epoch if in_epochs else 1, settings.global_batch).total
    return estimate_model(model, total, settings.hidden_share)


def _ask_data(settings: TrainSettings) -> tuple[int, int | None]:
    """Return the classes and the samples of an epoch of a stage's data; None samples of a stream."""
    data = settings.data
    try:
        if not is_stream(data.train):
            dataset = training_set(data)
            return len(dataset.classes), len(dataset)
        if data.val is not None:
            return len(Dataset.open(data.val, settings=data.store).classes), None
    except UserError as error:
        raise UserError(f"{error}; or tell --classes and --epoch, for data that is elsewhere") from None
    raise UserError(f"the stream {data.train} does not tell its classes; set data.val, or give --classes and --epoch")
