"""What a training stage reads: a data set, a mixture or a stream, behind one loader."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.datasettings import DataSettings
from pipeline.evaluate.classify import check_labelled
from pipeline.images import training_transform
from pipeline.prefetch import pin, pinned_array
from pipeline.schedule import Schedule
from pipeline.shuffleroom import check_window
from shards.dataset import Dataset
from shards.errors import UserError
from shards.ledger import new_segment
from shards.loader import Loader
from shards.manylabels import Accepts
from shards.mixedorder import PERIODS
from shards.mixture import Mixture
from shards.names import sample_names
from shards.processloader import ProcessLoader
from shards.stream import StreamLoader
from shards.tarstream import is_stream

OF_CLASSES = ("supervised", "finetune")  # kinds of stages that tell the classes of images


class TrainingData(NamedTuple):
    """The data of a training stage, as this rank sees it.

    Attributes:
        loader: Of this rank's batches.
        classes: Class names.
        epoch: Samples of an epoch; None of a stream, where nobody knows.
        held_out: What is evaluated on, if anything.
        schedule: Of the stage.
        names: ``tar`` and ``key`` of the samples at positions of the order; None of a stream, where nobody knows.
    """

    loader: Loader | ProcessLoader | StreamLoader
    classes: list[str]
    epoch: int | None
    held_out: Dataset | None
    schedule: Schedule
    names: Callable[[np.ndarray], Iterator[dict]] | None


def open_data(settings: TrainSettings, out: Path, first_batch: int) -> TrainingData:
    """Open the data of a training stage; what a loader leaves out is noted in ``out/quarantine.jsonl``.

    Args:
        settings: The stage.
        out: Its folder.
        first_batch: The global batch that the run began with.

    Raises:
        UserError: Something is not there or not whole, or things do not go together.
    """
    data = settings.data
    held_out = Dataset.open(data.val, settings=data.store) if data.val else None
    check_held_out(settings, held_out)
    options: dict[str, Any] = {
        "global_batch": settings.global_batch, "rank": distributed.rank(), "world_size": distributed.world_size(),
        "seed": settings.seed, "transform": training_transform(data), "threads": data.threads,
        "quarantine": out / "quarantine.jsonl", "labels": _labels(settings),
    }  # fmt: skip
    data.check_stream()
    loader: Loader | ProcessLoader | StreamLoader
    if is_stream(data.train):
        schedule = Schedule.of(settings, None, first_batch)
        assert held_out is not None  # which the settings of a stream ask for: the classes are theirs
        loader = StreamLoader(
            data.train, held_out.classes, stop=schedule.total, allow_pipe=data.allow_pipe, store=data.store,
            allocate=pinned_array, **options,
        )  # fmt: skip
        return TrainingData(loader, held_out.classes, None, held_out, schedule, None)
    dataset = training_set(data)
    check_same_classes(dataset, held_out)
    check_window(dataset, data, settings.seed)
    schedule = Schedule.of(settings, len(dataset), first_batch)
    in_process = data.decode == "process"
    kind = partial(ProcessLoader, register=pin) if in_process else partial(Loader, allocate=pinned_array)
    loader = kind(
        dataset, window_bytes=data.window_bytes, stop=schedule.total, **options,
        cache=data.open_cache(), cache_ranks=distributed.ranks_here(),
        ledger=distributed.everyone(new_segment(out / "ledger") if distributed.rank() == 0 else None)[0],
    )  # fmt: skip
    names = partial(sample_names, dataset, dataset.order(settings.seed, data.window_bytes))
    return TrainingData(loader, dataset.classes, len(dataset), held_out, schedule, names)


def check_held_out(settings: TrainSettings, held_out: Dataset | None) -> None:
    """Raise a UserError where a stage that tells classes is to be evaluated on images without any."""
    if held_out is not None and settings.kind in OF_CLASSES:
        check_labelled(held_out)


def check_same_classes(dataset: Dataset | Mixture, held_out: Dataset | None) -> None:
    """Raise a UserError where what is held out has other classes than what is trained on."""
    if held_out is not None and held_out.classes != dataset.classes:
        raise UserError(f"{held_out.url} has other classes than {dataset.url}; build both with one list of classes")


def _labels(settings: TrainSettings) -> Accepts:
    """Return how many labels an image may have: to a softmax one without is nothing, and elsewhere it serves."""
    return "some" if settings.kind in OF_CLASSES and settings.loss == "softmax" else "any"


def training_set(data: DataSettings) -> Dataset | Mixture:
    """Open the data set of a training stage, or several as the mixture that they are drawn from: by weight, or by size.

    Raises:
        UserError: One is not there or not whole, or their classes do not go together.
    """
    opened = [
        Dataset.open(source.url, source.exclude, settings=data.store, subset=source.subset) for source in data.sources
    ]
    return mixed(data, opened)


def mixed(data: DataSettings, opened: list[Dataset]) -> Dataset | Mixture:
    """Return what is drawn from a stage's training sets, opened in the order of its settings.

    Raises:
        UserError: Their classes do not go together, or one has too few images to be drawn by size.
    """
    if len(opened) == 1:
        return opened[0]
    total = sum(map(len, opened))
    for dataset, source in zip(opened, data.sources, strict=True):
        if source.weight is None and len(dataset) * PERIODS[-1] < total:
            raise UserError(
                f"{dataset.url} has {len(dataset):,} of {total:,} images, and drawn by size a set must have 1 of "
                f"{PERIODS[-1]}; give each a weight, or leave it out"
            )
    weights = [source.weight or len(dataset) for dataset, source in zip(opened, data.sources, strict=True)]
    return Mixture(list(zip(opened, weights, strict=True)))
