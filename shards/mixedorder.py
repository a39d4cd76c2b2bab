"""The order of a mixture: samples drawn from several orders by weight; pure functions of integers, no I/O.

The law. Row t of lane l is global position p = t * lanes + l. Each lane takes its rows in periods of ``period`` rows;
in each period every source has a fixed quota of rows, at places hashed from (seed, lane, period, row). The c-th row
(from 0) that lane l draws from a source is the source's own position c * lanes + l.

So every source goes through its own positions one by one, each exactly once, and has its own whole epochs: they
end earlier or later than those of the others. At the edges of periods, all lanes have drawn as much. A lane of the
mixture keeps to one lane of each source for an epoch of it, so ranks read their own chunks here as in one data set. And
where the run stands is still p alone: what was drawn before follows from it in O(period).
"""

from collections.abc import Sequence

import numpy as np

from shards.errors import UserError
from shards.hashing import hash_array, hash_int, sort_keys
from shards.order import DEFAULT_WINDOW_BYTES, ORDER_VERSION, Order, Shuffle, choose_shuffle

PERIODS = range(64, 1025)
"""Among these the period is chosen. Longer ones would be more exact than 0.1 % of all rows, at more cost."""

_DRAWS, _SOURCES = 3, 4  # what a hash is for, its second word; shards/hashing.py lists all


class MixedOrder:
    """The endless sequence of samples drawn from several orders; has what ``Order`` has.

    The shards of all sources are numbered through, source by source. Keeps each lane's current period; not for use from
    several threads at once.

    Args:
        orders: One order a source, all with the same number of lanes. Their seeds should differ (``source_seed``):
            else sources of equal size would show the same places of their shards at the same time.
        weights: How often each source is drawn, positive, of any sum.
        seed: Any integer.
        period: Rows after which each lane has drawn the sources exactly by their quotas, instead of the choice.

    Attributes:
        quotas: int64 [sources], rows of each source in a period.
        samples: Of all sources together: what counts as an epoch of the mixture.
        chunk_sizes: int64 [shards], samples a chunk of each shard; the last chunk of a shard may be shorter.

    Raises:
        UserError: The lanes differ, or a weight is not positive or too small to be drawn.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int, period: int | None = None):
        if len(orders) != len(weights):
            raise UserError(f"the mixture has {len(orders)} sources and {len(weights)} weights; give one each")
        lanes = [order.shuffle.lanes for order in orders]
        if len(set(lanes)) != 1:
            raise UserError(f"the sources of the mixture have {lanes} lanes; set one number for all")
        self.orders, self.lanes, self.seed = list(orders), lanes[0], seed
        self.period = period or choose_period(weights)
        self.quotas = quotas(weights, self.period)
        if (self.quotas == 0).any():
            raise UserError(f"weights {list(weights)} give {self.quotas.tolist()} of {period} rows; raise the period")
        self.samples = sum(order.samples for order in orders)
        self.chunk_sizes = np.concatenate([order.chunk_sizes for order in orders])
        self._first_shard = np.cumsum([0, *(len(order.sizes) for order in orders)])
        # A period's places are its draws sorted by source, then by row: first place and source of each.
        self._first_place = np.cumsum([0, *self.quotas])
        self._source_at = np.repeat(np.arange(len(orders)), self.quotas)
        # The current period of every lane: the place of each row, the row at each place, and which period it is.
        self._tables = np.zeros((self.lanes, 2, self.period), dtype=np.uint16)
        self._number = np.full(self.lanes, -1, dtype=np.int64)

    def identity(self, data: Sequence[str]) -> dict:
        """Return what a resumed run must agree on; ``data`` is the digest of each source."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "lanes": self.lanes,
            "chunk": [order.shuffle.chunk for order in self.orders],
            "block": [order.shuffle.block for order in self.orders],
            "weights": self.quotas.tolist(),
            "data": list(data),
        }

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the samples at global positions, non-negative int64 [n], in any order.

        Returns:
            epoch of its own source, shard and kept index within the shard, each int64 [n].
        """
        source, own = self.draw(positions)
        epoch, shard, index = (np.empty_like(own) for _ in range(3))
        for s in np.unique(source):
            mine = source == s
            epoch[mine], shard[mine], index[mine] = self.orders[s].locate(own[mine])
        return epoch, shard + self._first_shard[source], index

    def draw(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source at global positions, and the position in that source's own order; all int64 [n]."""
        row, lane = np.divmod(np.asarray(positions, dtype=np.int64), self.lanes)
        number, row = np.divmod(row, self.period)
        tables, group = self._periods(lane, number)
        place = tables[group, 0, row].astype(np.int64)
        source = self._source_at[place]
        drawn = number * self.quotas[source] + place - self._first_place[source]
        return source, drawn * self.lanes + lane

    def drawn(self, position: int) -> np.ndarray:
        """Return how many samples each lane draws of each source before a position, int64 [lanes, sources]."""
        lane = np.arange(self.lanes)
        number, row = np.divmod((position - lane + self.lanes - 1) // self.lanes, self.period)
        tables, group = self._periods(lane, number)
        before = tables[group, 1] < row[:, None]
        return number[:, None] * self.quotas + np.add.reduceat(before, self._first_place[:-1], axis=1, dtype=np.int64)

    def _positions(self, source: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return the global positions of positions in the sources' own orders: the inverse of ``draw``."""
        drawn, lane = np.divmod(own, self.lanes)
        number, place = np.divmod(drawn, self.quotas[source])
        tables, group = self._periods(lane, number)
        row = tables[group, 1, self._first_place[source] + place].astype(np.int64)
        return (number * self.period + row) * self.lanes + lane

    def needed_until(self, positions: np.ndarray) -> np.ndarray:
        """Return how long the chunk of each sample is needed, int64 [n] -> int64 [n]; as ``Order.needed_until``."""
        source, own = self.draw(positions)
        last = np.empty_like(own)
        for s in np.unique(source):
            mine = source == s
            last[mine] = self.orders[s].needed_until(own[mine])
        return self._positions(source, last)

    def next_use(
        self, positions: np.ndarray, ranks: Sequence[int] = (0,), world_size: int = 1, epochs: int = 1
    ) -> np.ndarray:
        """Return when some ranks need the chunk of each sample again; as ``Order.next_use``, but for a period or two.

        The epochs are the source's own. If the ranks do not divide the lanes, it may be another rank that needs it.
        """
        source, own = self.draw(positions)
        use = np.empty_like(own)
        for s in np.unique(source):
            mine = source == s
            use[mine] = self.orders[s].next_use(own[mine], ranks, world_size, epochs)
        return self._positions(source, use)

    def stand_in(self, position: int, attempt: int) -> int:
        """Return the position whose sample, of the same source, replaces the one at ``position``; see ``Order``."""
        source, own = self.draw(np.array([position]))
        own = self.orders[source[0]].stand_in(int(own[0]), attempt)
        return int(self._positions(source, np.array([own]))[0])

    def _periods(self, lane: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the tables of all periods that are named, uint16 [periods, 2, period], and which one each name is."""
        _, first, group = np.unique(number * self.lanes + lane, return_index=True, return_inverse=True)
        lane, number = lane[first], number[first]
        tables = self._tables[lane]
        new = np.flatnonzero(self._number[lane] != number)
        if len(new):
            tables[new] = self._make_tables(lane[new], number[new])
            lanes, latest = np.unique(lane[::-1], return_index=True)  # periods ascend: the last one of a lane stays
            latest = len(lane) - 1 - latest
            self._tables[lanes], self._number[lanes] = tables[latest], number[latest]
        return tables, group

    def _make_tables(self, lane: np.ndarray, number: np.ndarray) -> np.ndarray:
        rows = np.arange(self.period, dtype=np.uint64)
        keys = sort_keys(hash_array(hash_int(self.seed, _DRAWS), lane[:, None], number[:, None], rows), rows)
        keys.sort(axis=1)
        source = self._source_at[keys.astype(np.uint32)]
        tables = np.empty((len(lane), 2, self.period), dtype=np.uint16)
        tables[:, 1] = np.argsort(source, axis=1, kind="stable")
        np.put_along_axis(tables[:, 0], tables[:, 1].astype(np.int64), rows.astype(np.uint16)[None], axis=1)
        return tables


def source_seed(seed: int, source: int) -> int:
    """Return the seed of a source's own order in a mixture of this seed."""
    return hash_int(seed, _SOURCES, source)


def quotas(weights: Sequence[float], period: int) -> np.ndarray:
    """Split a period among weights by largest remainder (of equal ones, the first), int64 [weights].

    Raises:
        UserError: A weight is not positive.
    """
    share = _shares(weights) * period
    whole = np.floor(share).astype(np.int64)
    whole[np.argsort(whole - share, kind="stable")[: period - whole.sum()]] += 1
    return whole


def choose_period(weights: Sequence[float]) -> int:
    """Return the period of ``PERIODS`` whose quotas come closest to the weights, relatively; of equal ones the first.

    Raises:
        UserError: A weight is not positive, or would not give a whole row of the longest period.
    """
    share = _shares(weights)
    if share.min() * PERIODS[-1] < 1:
        raise UserError(
            f"the mixture's weights are {list(weights)}; the smallest is {share.min():.2g} of their sum and must be at "
            f"least 1/{PERIODS[-1]}: raise it, or leave its source out"
        )
    errors = [np.abs(quotas(weights, period) / (period * share) - 1).max() for period in PERIODS]
    return PERIODS[int(np.argmin(np.round(errors, 9)))]  # rounded: equal ones may differ in the last bit


def choose_shuffles(
    samples: Sequence[int],
    mean_bytes: Sequence[float],
    weights: Sequence[float],
    window_bytes: float = DEFAULT_WINDOW_BYTES,
    lanes: int | None = None,
    chunk: int | None = None,
    block: int | None = None,
) -> list[Shuffle]:
    """Choose how to cut the orders of a mixture: the lanes as for one data set, the window shared out by weight.

    A source's block then lasts as long as those of the others. What is given is taken as it is, for every source.

    Args:
        samples: Kept samples of each source.
        mean_bytes: Mean size of a sample of each source, in bytes.
        weights: Of the sources.
        window_bytes: Upper bound of the shuffle window, over the whole cluster.
        lanes: Number of lanes, instead of the choice.
        chunk: Samples a chunk, instead of the choice.
        block: Samples a block, instead of the choice.
    """
    shares = _shares(weights).tolist()
    mean = sum(share * size for share, size in zip(shares, mean_bytes, strict=True))
    lanes = lanes or choose_shuffle(sum(samples), mean, window_bytes, None, chunk, block).lanes
    return [
        choose_shuffle(number, size, share * window_bytes, lanes, chunk, block)
        for number, size, share in zip(samples, mean_bytes, shares, strict=True)
    ]


def _shares(weights: Sequence[float]) -> np.ndarray:
    share = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(share).all() and (share > 0).all()):
        raise UserError(f"the mixture's weights are {list(weights)}; give positive numbers")
    return share / share.sum()
