"""Several data sets as one: a loader draws from them by weight."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import numpy as np

from shards.dataset import Dataset, Sample, Through
from shards.errors import UserError
from shards.mixedorder import MixedOrder, choose_shuffles, source_seed
from shards.order import DEFAULT_WINDOW_BYTES, Order


class Mixture:
    """Data sets to draw from by weight, in place of one: ``Loader(Mixture([(photos, 3), (drawings, 1)]), ...)``.

    The shards of all sources are numbered through, source by source. Labels are those of the first source's classes;
    another source may have them in another order, or some of them.

    Args:
        sources: Data sets, each with its weight: samples are drawn by the ratio of the weights, whatever the sizes.

    Attributes:
        datasets: The sources.
        weights: As given.
        url: Of all sources.
        classes: Class names; labels index into them.
        digest: The digest of each source.
        exclude: The version of each source's drop list, or None.
        shard_sizes: (shards,) int64, kept samples a shard.
        local: (shards,) bool, whether reads of a shard are cheap one by one.
        concurrency: Requests in flight, the most that the settings of a source's stores say, or None.

    Raises:
        UserError: There is no source, or one has classes that the first has not.
    """

    def __init__(self, sources: Sequence[tuple[Dataset, float]]):
        if not sources:
            raise UserError("the mixture has no source; give at least one data set with its weight")
        self.datasets, self.weights = [dataset for dataset, _ in sources], [float(weight) for _, weight in sources]
        self.url = " + ".join(dataset.url for dataset in self.datasets)
        self.classes = self.datasets[0].classes
        self.digest = [dataset.digest for dataset in self.datasets]
        self.exclude = [dataset.exclude for dataset in self.datasets]
        self.shard_sizes = np.concatenate([dataset.shard_sizes for dataset in self.datasets])
        self.local = np.concatenate([dataset.local for dataset in self.datasets])
        self.concurrency = max((d.concurrency for d in self.datasets if d.concurrency), default=None)
        self._places = list(chain(*([(d, s) for s in range(len(d.shard_sizes))] for d in self.datasets)))
        self._labels = {dataset: _labels(dataset, self.datasets[0]) for dataset in self.datasets}

    def __reduce__(self) -> tuple:
        """Let another process open it again."""
        return Mixture, (list(zip(self.datasets, self.weights, strict=True)),)

    def __len__(self) -> int:
        """Return the samples of all sources together: what counts as an epoch of the mixture."""
        return int(self.shard_sizes.sum())

    def order(
        self,
        seed: int,
        window_bytes: float = DEFAULT_WINDOW_BYTES,
        lanes: int | None = None,
        chunk: int | None = None,
        block: int | None = None,
    ) -> MixedOrder:
        """Return the order of a run; see ``choose_shuffles`` in shards/mixedorder.py for the arguments.

        Raises:
            UserError: A weight is not positive, or too small to be drawn.
        """
        samples, sizes = [len(d) for d in self.datasets], [d.mean_bytes for d in self.datasets]
        shuffles = choose_shuffles(samples, sizes, self.weights, window_bytes, lanes, chunk, block)
        orders = [
            Order(dataset.shard_sizes, source_seed(seed, s), shuffle)
            for s, (dataset, shuffle) in enumerate(zip(self.datasets, shuffles, strict=True))
        ]
        return MixedOrder(orders, self.weights, seed)

    @property
    def retries(self) -> int:
        """Reads of all sources that were asked again so far."""
        return sum(dataset.retries for dataset in set(self.datasets))

    def place(self, shard: int) -> tuple[Dataset, int]:
        """Return the data set that a shard is of, and its number there."""
        return self._places[shard]

    def read(self, shard: int, index: int) -> Sample:
        """Read one sample by its place among the kept samples of a shard; raises as ``Dataset.read``."""
        dataset, inside = self._places[shard]
        return self._numbered(dataset, shard - inside, dataset.read(inside, index))

    def read_many(self, shard: int, start: int, stop: int, through: Through | None = None) -> list[Sample]:
        """Read consecutive kept samples of a shard; arguments and errors as of ``Dataset.read_many``."""
        dataset, inside = self._places[shard]
        found = dataset.read_many(inside, start, stop, through)
        return [self._numbered(dataset, shard - inside, sample) for sample in found]

    def _numbered(self, dataset: Dataset, first_shard: int, sample: Sample) -> Sample:
        """Return a sample with labels and shard as the mixture numbers them."""
        labels, shard = self._labels[dataset], first_shard + sample.shard
        if labels is None:
            return sample._replace(shard=shard)
        return sample._replace(shard=shard, labels=tuple(labels[each] for each in sample.labels))


def _labels(dataset: Dataset, first: Dataset) -> list[int] | None:
    """Return the label in ``first`` of each label of ``dataset``, by class names; None where they are the same."""
    if dataset.classes == first.classes:
        return None
    label = {name: number for number, name in enumerate(first.classes)}
    if unknown := [name for name in dataset.classes if name not in label]:
        raise UserError(
            f"{len(unknown)} of the classes of {dataset.url} are not among those of {first.url}: {_some(unknown)}; put "
            "the source that has all classes first, or build both with one list of classes"
        )
    times = Counter(first.classes) + Counter(set(dataset.classes))
    if several := [name for name in dataset.classes if times[name] > 2]:
        raise UserError(
            f"{dataset.url} lists its classes otherwise than {first.url}, which has several of one name: "
            f"{_some(several)}; build both with one list of classes"
        )
    return [label[name] for name in dataset.classes]


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, dict.fromkeys(names[:5])))
    return f"{shown} ..." if len(names) > 5 else shown
