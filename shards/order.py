"""The order of samples: pure functions of integers, no I/O.

The law. Let N be the kept samples of an epoch, in shards of given sizes. Every shard is cut into chunks of
``chunk`` consecutive kept samples (the last one of a shard may be shorter). Epoch e permutes all chunks by a
hash of (seed, e), see shards/permutation.py; the resulting sequence of samples is cut into ``lanes`` lanes, the
first N mod lanes of them one longer than the rest; inside a lane, blocks of ``block`` samples are permuted by a
hash of (seed, e, lane, block, slot). The first block of lane l is only ``max(1, block * (l + 1) // lanes)``
long, so that lanes do not all change their block in one step. Global position p lies in epoch e = p div N, at
p' = p mod N, in lane p' mod lanes, at offset p' div lanes.

So where a run stands is p alone, whatever the number of ranks, threads and restarts, and finding any p costs
O(1) once the plan of its epoch is made, which costs O(shards).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from shards.errors import UserError
from shards.hashing import hash_array, hash_int, sort_keys
from shards.permutation import Permutation

ORDER_VERSION = 2
"""Part of a run's state: raised whenever the law above gives other positions."""

STAND_INS = 64
"""Tried before a broken sample ends a run: a chunk may be broken whole, a block hardly."""

DEFAULT_WINDOW_BYTES = 16e9
_LANES = (15360, 3840, 960, 240, 48, 12, 4, 2, 1)
_CHUNKS, _BLOCKS = 1, 2  # what a hash is for, its second word; shards/hashing.py lists all
_SLICE = 1 << 16


@dataclass(frozen=True)
class Shuffle:
    """How an order is cut: number of lanes, samples a chunk, samples a block."""

    lanes: int
    chunk: int
    block: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 1 <= value < 1 << 32:
                raise UserError(f"{name} of the order is {value}; give a whole number from 1 to 2**32 - 1")

    @property
    def window(self) -> int:
        """Samples among which the shuffle mixes, over the whole cluster."""
        return self.lanes * max(self.block, self.chunk)


def choose_shuffle(
    samples: int,
    mean_bytes: float,
    window_bytes: float = DEFAULT_WINDOW_BYTES,
    lanes: int | None = None,
    chunk: int | None = None,
    block: int | None = None,
) -> Shuffle:
    """Choose how to cut an order from the data and the window alone, never from the number of ranks.

    The lanes are as many as leave a block two range reads of 8 MB long; the block then fills the window; the chunk
    is a quarter of it, at most such a read: larger ones mix worse, smaller ones are more requests. What is given is
    taken as it is.

    Args:
        samples: Kept samples of an epoch.
        mean_bytes: Mean size of a sample in bytes.
        window_bytes: Upper bound of the shuffle window, over the whole cluster.
        lanes: Number of lanes, instead of the choice.
        chunk: Samples a chunk, instead of the choice.
        block: Samples a block, instead of the choice.
    """
    mean_bytes = max(1.0, mean_bytes)
    room = max(1, int(min(samples, window_bytes / mean_bytes)))
    longest = chunk or max(1, int(min(8e6 / mean_bytes, 512, room / 384)))
    if lanes is None:
        lanes = next((n for n in _LANES if n * max(2 * longest, block or 0) <= room), 1)
    if block is None:
        block = max(2, room // lanes)
    return Shuffle(lanes, chunk or max(1, min(longest, block // 4)), block)


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """One epoch's chunks in their order.

    Attributes:
        chunks: Gives the chunk at each place; its inverse the place of each chunk.
        short_places: int64 [short], places of the chunks that are not full, ascending.
        short_ends: int64 [short], where the sequence of samples leaves them.
        missing: int64 [short + 1], samples that the first k short chunks lack. A sequence index plus what is
            missing before it, divided by the chunk size, is the place of its chunk: no table over all chunks
            is needed.
    """

    chunks: Permutation
    short_places: np.ndarray
    short_ends: np.ndarray
    missing: np.ndarray


class Order:
    """The endless sequence of samples of one data set.

    Keeps the plans of two epochs, of more once ``next_use`` looks further, and each lane's current block; not for use
    from several threads at once.

    Args:
        shard_sizes: Kept samples of each shard, integers [shards].
        seed: Any integer.
        shuffle: How the order is cut.

    Attributes:
        samples: Of an epoch.
        chunk_sizes: int64 [shards], samples a chunk of each shard; the last chunk of a shard may be shorter.

    Raises:
        UserError: There is no sample.
    """

    def __init__(self, shard_sizes: np.ndarray, seed: int, shuffle: Shuffle):
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if self.samples < 1:
            raise UserError("the data set has no sample left to train on; look at its drop list and shards")
        self.seed = seed
        self.shuffle = shuffle
        self.chunk_sizes = np.full(len(self.sizes), shuffle.chunk, dtype=np.int64)
        self._first_chunk = np.concatenate([[0], np.cumsum(-(-self.sizes // shuffle.chunk))])
        self._short, self._longer = divmod(self.samples, shuffle.lanes)
        self._plans: dict[int, EpochPlan] = {}
        self._plans_kept = 2
        # The current block of every lane: a row of permuted slots, and which block it is.
        width = min(shuffle.block, self._short + 1)
        self._rows = np.zeros((shuffle.lanes, width), dtype=np.uint32)
        self._row_of = np.full(shuffle.lanes, -1, dtype=np.int64)
        self._blocks_a_lane = 2 + (self._short + 1) // shuffle.block

    @property
    def orders(self) -> list["Order"]:
        """The orders of all sources, as of a mixture: this one."""
        return [self]

    def identity(self, data: str | list[str]) -> dict:
        """Return what a resumed run must agree on; ``data`` is the digest of data set and drop list."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            "lanes": self.shuffle.lanes,
            "chunk": self.shuffle.chunk,
            "block": self.shuffle.block,
            "data": data,
        }

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Find the samples at global positions.

        Args:
            positions: Non-negative int64 [n], in any order.

        Returns:
            epoch, shard and kept index within the shard, each int64 [n].
        """
        epoch, inside = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        offset, lane = np.divmod(inside, self.shuffle.lanes)
        block, begin, size = self._block(lane, offset)
        start = lane * self._short + np.minimum(lane, self._longer)
        sequence = start + begin + self._permuted(epoch, lane, block, size, offset - begin)
        shard, index = np.empty_like(sequence), np.empty_like(sequence)
        for e in np.unique(epoch):
            here = epoch == e
            shard[here], index[here] = self._sample(self.plan(int(e)), sequence[here])
        return epoch, shard, index

    def needed_until(self, positions: np.ndarray) -> np.ndarray:
        """Return how long the chunk of each sample is needed by the lane that the sample is in.

        Args:
            positions: Non-negative int64 [n].

        Returns:
            int64 [n], the last position of the block in which the last sample of the chunk, as far as it is in the
            lane, comes.
        """
        epoch, inside = np.divmod(np.asarray(positions, dtype=np.int64), self.samples)
        offset, lane = np.divmod(inside, self.shuffle.lanes)
        block, begin, size = self._block(lane, offset)
        start = lane * self._short + np.minimum(lane, self._longer)
        sequence = start + begin + self._permuted(epoch, lane, block, size, offset - begin)
        last = np.empty_like(sequence)
        for e in np.unique(epoch):
            here = epoch == e
            shard, index = self._sample(self.plan(int(e)), sequence[here])
            chunk = self.shuffle.chunk
            length = np.minimum(chunk, self.sizes[shard] - index // chunk * chunk)
            last[here] = sequence[here] - index % chunk + length - 1
        last = np.minimum(last - start, self._lane_length(lane) - 1)
        _, begin, size = self._block(lane, last)
        return epoch * self.samples + (begin + size - 1) * self.shuffle.lanes + lane

    def find(self, epoch: np.ndarray, shard: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the position at which a sample comes in an epoch: the inverse of ``locate``.

        Args:
            epoch: int64 [n].
            shard: int64 [n].
            index: Kept index within the shard, int64 [n].

        Returns:
            int64 [n].
        """
        number, inside = np.divmod(index, self.shuffle.chunk)
        chunk = self._first_chunk[shard] + number
        sequence = np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            sequence[here] = self._sequence(self.plan(int(e)), chunk[here], inside[here])
        edge = self._longer * (self._short + 1)  # from here on, lanes are one sample shorter
        lane = np.where(
            sequence < edge, sequence // (self._short + 1), self._longer + (sequence - edge) // max(1, self._short)
        )
        offset = sequence - lane * self._short - np.minimum(lane, self._longer)
        block, begin, size = self._block(lane, offset)
        slot = self._slots(epoch, lane, block, size, offset - begin)
        return epoch * self.samples + (begin + slot) * self.shuffle.lanes + lane

    def next_use(
        self, positions: np.ndarray, ranks: Sequence[int] = (0,), world_size: int = 1, epochs: int = 1
    ) -> np.ndarray:
        """Return when some of all ranks need the chunk of each sample again, once the sample's lane is done with it.

        That is in the next epoch if these are all ranks; or in this one, if the chunk is cut over two lanes or its lane
        is read by several ranks.

        Args:
            positions: Non-negative int64 [n].
            ranks: Those that are asked for.
            world_size: Number of all ranks.
            epochs: How many epochs after the sample's own to look through; their plans stay in memory.

        Returns:
            int64 [n], the first position after ``needed_until(positions)`` that is of one of the ranks and of a sample
            of the chunk. Where these epochs have none: the last position of a sample of the chunk in them.
        """
        self._plans_kept = max(self._plans_kept, 2 + epochs)
        epoch, shard, index = self.locate(positions)
        chunk = self.shuffle.chunk
        first = index - index % chunk
        last = np.minimum(first + chunk, self.sizes[shard]) - 1
        samples = np.minimum(first[:, None] + np.arange(chunk), last[:, None])  # the last one again, in a short chunk
        wanted = np.broadcast_arrays(
            epoch[:, None, None] + np.arange(1 + epochs)[:, None], shard[:, None, None], samples[:, None]
        )
        uses = self.find(*(each.ravel() for each in wanted)).reshape(len(epoch), -1)
        again = (uses > self.needed_until(positions)[:, None]) & np.isin(uses % world_size, ranks)
        return np.where(again, uses, uses.max(axis=1, keepdims=True)).min(axis=1)

    def stand_in(self, position: int, attempt: int) -> int:
        """Return the position whose sample replaces the one at ``position`` if it cannot be decoded.

        Attempts 1, 2, ... go round the samples of its block, which are the ones at hand; a block too short
        for that many is left for the lane's later positions.
        """
        epoch, inside = divmod(position, self.samples)
        offset, lane = divmod(inside, self.shuffle.lanes)
        _, begin, size = (int(x[0]) for x in self._block(np.array([lane]), np.array([offset])))
        if attempt >= size:
            return position + attempt * self.shuffle.lanes
        offset = begin + (offset - begin + attempt) % size
        return epoch * self.samples + offset * self.shuffle.lanes + lane

    def plan(self, epoch: int) -> EpochPlan:
        """Return the plan of an epoch, from the last ones used or made anew: O(shards)."""
        plan = self._plans.pop(epoch, None) or self._make_plan(epoch)
        self._plans[epoch] = plan  # the last used comes last
        if len(self._plans) > self._plans_kept:
            del self._plans[next(iter(self._plans))]
        return plan

    def _make_plan(self, epoch: int) -> EpochPlan:
        chunks = Permutation(int(self._first_chunk[-1]), hash_int(self.seed, _CHUNKS, epoch))
        lacking = -self.sizes % self.shuffle.chunk
        shards = np.flatnonzero(lacking)
        places = chunks.inverse(self._first_chunk[shards + 1] - 1)  # the last chunk of a shard is the short one
        ascending = places.argsort()
        places, missing = places[ascending], np.cumsum(lacking[shards[ascending]])
        return EpochPlan(chunks, places, (places + 1) * self.shuffle.chunk - missing, np.concatenate([[0], missing]))

    def _shard(self, chunk: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_chunk, chunk, side="right") - 1

    def _sample(self, plan: EpochPlan, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and kept index of indices into an epoch's sequence before the blocks are permuted."""
        padded = sequence + plan.missing[np.searchsorted(plan.short_ends, sequence, side="right")]
        place, inside = np.divmod(padded, self.shuffle.chunk)
        chunk = plan.chunks(place)
        shard = self._shard(chunk)
        return shard, (chunk - self._first_chunk[shard]) * self.shuffle.chunk + inside

    def _sequence(self, plan: EpochPlan, chunk: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Return the indices into an epoch's sequence of samples of chunks: the inverse of ``_sample``."""
        place = plan.chunks.inverse(chunk)
        return place * self.shuffle.chunk - plan.missing[np.searchsorted(plan.short_places, place)] + inside

    def _lane_length(self, lane: np.ndarray) -> np.ndarray:
        return self._short + (lane < self._longer)

    def _block(self, lane: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return number, first offset and length of the block that holds each offset of its lane."""
        full = self.shuffle.block
        first = np.maximum(1, full * (lane + 1) // self.shuffle.lanes)
        block = np.where(offset < first, 0, 1 + (offset - first) // full)
        begin = np.where(block == 0, 0, first + (block - 1) * full)
        return block, begin, np.minimum(np.where(block == 0, first, full), self._lane_length(lane) - begin)

    def _permuted(
        self, epoch: np.ndarray, lane: np.ndarray, block: np.ndarray, size: np.ndarray, slot: np.ndarray
    ) -> np.ndarray:
        """Return the permuted slot of each slot of its block, making the blocks that are not at hand."""
        names, first, group = np.unique(
            (epoch * self._blocks_a_lane + block) * self.shuffle.lanes + lane,
            return_index=True,
            return_inverse=True,
        )
        permuted = self._rows[lane, slot]
        new = np.flatnonzero(self._row_of[lane[first]] != names)
        width = self._rows.shape[1]
        many = max(1, _SLICE // width)
        for part in (new[a : a + many] for a in range(0, len(new), many)):
            one = first[part]
            rows = self._permutations(epoch[one], lane[one], block[one], size[one])
            row_of_group = np.full(len(names), -1)
            row_of_group[part] = np.arange(len(part))
            row = row_of_group[group]
            mine = np.flatnonzero(row >= 0)
            permuted[mine] = rows[row[mine], slot[mine]]
            lanes, latest = np.unique(lane[one][::-1], return_index=True)
            latest = len(part) - 1 - latest
            self._rows[lanes], self._row_of[lanes] = rows[latest], names[part[latest]]
        return permuted.astype(np.int64)

    def _slots(
        self, epoch: np.ndarray, lane: np.ndarray, block: np.ndarray, size: np.ndarray, permuted: np.ndarray
    ) -> np.ndarray:
        """Return the slot that became each permuted slot of its block: the inverse of ``_permuted``."""
        names, first, group = np.unique(
            (epoch * self._blocks_a_lane + block) * self.shuffle.lanes + lane,
            return_index=True,
            return_inverse=True,
        )
        slot = np.empty_like(permuted)
        many = max(1, _SLICE // self._rows.shape[1])
        for a in range(0, len(names), many):
            one = first[a : a + many]
            inverse = self._permutations(epoch[one], lane[one], block[one], size[one]).argsort(axis=1)
            mine = np.flatnonzero((group >= a) & (group < a + many))
            slot[mine] = inverse[group[mine] - a, permuted[mine]]
        return slot

    def _permutations(self, epoch: np.ndarray, lane: np.ndarray, block: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Return each block's permutation, uint32 [blocks, width]; past its size a row means nothing."""
        slots = np.arange(self._rows.shape[1], dtype=np.uint64)
        hashes = hash_array(hash_int(self.seed, _BLOCKS), epoch[:, None], lane[:, None], block[:, None], slots)
        keys = sort_keys(hashes, slots)
        keys[slots >= size[:, None].astype(np.uint64)] = np.iinfo(np.uint64).max
        keys.sort(axis=1)
        return keys.astype(np.uint32)


def rank_positions(position: int, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Return the positions from ``position`` on that are this rank's share of a global batch, int64."""
    first = position + (rank - position) % world_size
    return np.arange(first, position + global_batch, world_size, dtype=np.int64)


def check_batch(global_batch: int, world_size: int) -> None:
    """Raise UserError unless every rank gets the same positive number of samples of a global batch."""
    if global_batch < 1 or global_batch % world_size:
        below = global_batch // world_size * world_size
        near = " or ".join(str(g) for g in (below, below + world_size) if g > 0)
        raise UserError(f"global batch {global_batch} does not divide among {world_size} ranks; use {near}")


def read_factor(world_size: int, lanes: int) -> int:
    """Return how many ranks read each lane, so each chunk, in an epoch: 1 where ranks divide lanes."""
    return world_size // gcd(world_size, lanes)


def kept_to_raw(kept: np.ndarray, dropped: np.ndarray) -> np.ndarray:
    """Map indices among a shard's kept samples to indices among all its samples.

    Args:
        kept: Integers [n].
        dropped: Raw indices of the shard's dropped samples, ascending, without repetition.

    Returns:
        int64 [n].
    """
    dropped, kept = np.asarray(dropped, dtype=np.int64), np.asarray(kept, dtype=np.int64)
    kept_before = dropped - np.arange(len(dropped))
    return kept + np.searchsorted(kept_before, kept, side="right")
