"""What a training stage will cost, before anything of it is there."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import TrainSettings
from pipeline.convert.recognise import open_source
from pipeline.data import training_set
from pipeline.engines.states import checkpoint_bytes
from pipeline.flops import BACKWARD, cost_of
from pipeline.hardware import card
from pipeline.memory import MemoryEstimate
from pipeline.schedule import Schedule
from pipeline.shuffleroom import window_of_rank
from pipeline.weights import resolve_model
from shards.dataset import Dataset
from shards.errors import UserError
from shards.order import choose_shuffle
from shards.tarstream import is_stream

IMAGE_BYTES = 110_000
"""Of an image, where nobody knows: the mean of ImageNet's."""

ROOM = 0.9
"""Share of a card's memory that a rank may fill: its driver, NCCL and what the allocator cannot join take the rest."""


class Hardware(NamedTuple):
    """What a stage is to run on.

    Attributes:
        ranks: One a GPU.
        gpu: Name of the card; None: of no known one, or without GPUs.
        utilisation: Share of the card's peak that a step's arithmetic, recomputation included, is assumed to reach.
    """

    ranks: int
    gpu: str | None = None
    utilisation: float = 0.4


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


def estimate_stage(
    settings: TrainSettings,
    classes: int | None,
    epoch: int | None,
    hardware: Hardware | None = None,
    image_bytes: float | None = None,
) -> dict[str, Any]:
    """Return what ``estimate_model`` does for a training stage, and what it takes of disks, memory and time.

    Args:
        settings: The stage.
        classes: How many there are; None asks the data set.
        epoch: Samples of an epoch; None asks the data set, if that is what the stage's duration is in.
        hardware: What it is to run on; None leaves memory and speed out.
        image_bytes: Mean size of an image in the shards; None asks the data set, if it is asked anything.

    Raises:
        UserError: The data or the weights that would tell are not there; the ranks do not divide the batch; a card is
            not known.
    """
    in_epochs = "epoch" in settings.duration
    if classes is None or (in_epochs and epoch is None):
        known_classes, known_epoch, known_bytes = _ask_data(settings)
        classes, epoch = classes or known_classes, epoch or known_epoch
        image_bytes = image_bytes or known_bytes
    init = None  # another stage may have yet to make them
    if settings.init is not None and (settings.model.name is None or Path(settings.init).exists()):
        init = open_source(settings.init)
    model = resolve_model(settings, init, classes)
    # No other length than the duration changes what a stage costs.
    total = Schedule.of(settings, epoch if in_epochs else 1, settings.global_batch).total
    found = estimate_model(model, total, settings.hidden_share)
    found |= {
        "checkpoint_bytes": checkpoint_bytes(settings.optim, found["parameters"]),
        "image_bytes": image_bytes or IMAGE_BYTES, "image_bytes_assumed": image_bytes is None,
        "shard_bytes": round(epoch * (image_bytes or IMAGE_BYTES)) if epoch else None,
    }  # fmt: skip
    return found | (_on(hardware, settings, model, found, epoch) if hardware else {})


def _on(
    hardware: Hardware, settings: TrainSettings, model: dict[str, Any], found: dict[str, Any], epoch: int | None
) -> dict[str, Any]:
    """Return memory and shuffle window of a stage on some hardware, and on a known card speed and what fits."""
    gpu = card(hardware.gpu) if hardware.gpu else None
    memory = MemoryEstimate(settings, model, hardware.ranks, cuda=gpu is not None)
    micro_batch, size = settings.micro_batch or memory.local, found["image_bytes"]
    window = choose_shuffle(epoch or found["samples"], size, settings.data.window_bytes)
    told: dict[str, Any] = {
        "ranks": hardware.ranks, "zero_stage": settings.engine.zero_stage, "precision": settings.engine.precision,
        "micro_batch": micro_batch, "accumulation": memory.local // micro_batch,
        "recompute_every": settings.engine.recompute_every, "offload_optimizer": settings.engine.offload_optimizer,
        "offload_parameters": settings.engine.offload_parameters, "memory": asdict(memory.at(micro_batch)),
        "shuffle_window_bytes": round(window.window * size),
        "shuffle_window_bytes_of_rank": round(window_of_rank(window, size, hardware.ranks)),
    }  # fmt: skip
    if gpu is None:
        return told
    room = ROOM * 1e9 * gpu.gigabytes
    again = memory.recomputed * found["forward_flops"]
    flops = (1 + BACKWARD) * found["forward_flops"] + again
    speed = hardware.ranks * hardware.utilisation * gpu.flops(settings.engine.precision) / flops
    return told | {
        "gpu": hardware.gpu, "gpu_bytes": round(1e9 * gpu.gigabytes), "room_bytes": round(room),
        "fits": told["memory"]["device_peak"] <= room, "largest_micro_batch": memory.largest(room),
        "utilisation": hardware.utilisation, "images_per_second": speed, "days": found["samples"] / speed / 86400,
        "shard_bytes_per_second": speed * size,
    }  # fmt: skip


def _ask_data(settings: TrainSettings) -> tuple[int, int | None, float | None]:
    """Return classes, samples of an epoch and bytes of an image of a stage's data; of a stream the first alone."""
    data = settings.data
    try:
        if not is_stream(data.train):
            dataset = training_set(data)
            sizes = sum(len(each) * each.mean_bytes for each in dataset.datasets)
            return len(dataset.classes), len(dataset), sizes / len(dataset)
        if data.val is not None:
            return len(Dataset.open(data.val, settings=data.store).classes), None, None
    except UserError as error:
        raise UserError(f"{error}; or tell --classes and --epoch, for data that is elsewhere") from None
    raise UserError(f"the stream {data.train} does not tell its classes; set data.val, or give --classes and --epoch")
