"""Means over a whole data set: every image exactly once, on any number of ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.prefetch import prefetched
from shards.augment import Transform
from shards.dataset import Dataset
from shards.evaluation import EvaluationBatch, EvaluationLoader
from shards.manylabels import Accepts


@torch.no_grad()
def mean_over(
    dataset: Dataset,
    transform: Transform,
    batch: int,
    threads: int,
    prepare: Callable[[EvaluationBatch], tuple[Tensor, ...]],
    measure: Callable[..., Tensor],
    labels: Accepts = "any",
) -> tuple[list[float], int]:
    """Return the mean of each thing that is measured, and the number of images; collective over all ranks.

    Args:
        dataset: Images.
        transform: Makes squares of images.
        batch: Images a rank takes at once; the padding of the last batch is left out of the means.
        threads: Decode threads.
        prepare: Brings a batch to the device.
        measure: ``measure(*prepare(batch)) -> [n, things]``.
        labels: How many an image may have.
    """
    device = distributed.device()
    parts = EvaluationLoader(
        dataset, batch, transform=transform, rank=distributed.rank(), world_size=distributed.world_size(),
        threads=threads, labels=labels,
    )  # fmt: skip
    sums: Tensor | float = 0.0

    def with_valid(part: EvaluationBatch) -> tuple[Tensor, ...]:
        return *prepare(part), torch.from_numpy(part.valid).to(device)

    for *inputs, valid in prefetched(iter(parts), with_valid, device):
        sums = sums + measure(*inputs)[valid].double().sum(dim=0).cpu()
    sums = distributed.sum_over_ranks(sums.tolist())
    return [each / len(dataset) for each in sums], len(dataset)
