"""Means over a whole data set: every image exactly once, on any number of ranks."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.prefetch import prefetched
from shards.augment import Transform
from shards.dataset import Dataset
from shards.evaluation import EvaluationBatch, EvaluationLoader


def each_batch(
    dataset: Dataset,
    transform: Transform,
    batch: int,
    threads: int,
    prepare: Callable[[EvaluationBatch], tuple[Tensor, ...]],
) -> Iterator[tuple[Tensor, ...]]:
    """Yield this rank's batches on the device, as ``(*prepare(batch), positions, valid)``; as many on every rank.

    Args:
        dataset: Images.
        transform: Makes squares of images.
        batch: Images a rank takes at once; the last batch is filled up with rows that are not ``valid``.
        threads: Decode threads.
        prepare: Brings a batch, whose images may have any number of labels, to the device.
    """
    device = distributed.device()
    parts = EvaluationLoader(
        dataset, batch, transform=transform, rank=distributed.rank(), world_size=distributed.world_size(),
        threads=threads, labels="any",
    )  # fmt: skip

    def whole(part: EvaluationBatch) -> tuple[Tensor, ...]:
        return *prepare(part), *(torch.from_numpy(each).to(device) for each in (part.positions, part.valid))

    yield from prefetched(iter(parts), whole, device)


@torch.no_grad()
def mean_over(
    dataset: Dataset,
    transform: Transform,
    batch: int,
    threads: int,
    prepare: Callable[[EvaluationBatch], tuple[Tensor, ...]],
    measure: Callable[..., Tensor],
) -> tuple[list[float], int]:
    """Return the mean of each thing that is measured, and the number of images; collective over all ranks.

    Args: As of ``each_batch``, and
        measure: ``measure(*prepare(batch)) -> [n, things]``.
    """
    sums = torch.zeros((), dtype=torch.float64)
    for *inputs, _, valid in each_batch(dataset, transform, batch, threads, prepare):
        sums = sums + measure(*inputs)[valid].double().sum(dim=0).cpu()
    totals = distributed.sum_over_ranks(sums.tolist())
    return [each / len(dataset) for each in totals], len(dataset)
