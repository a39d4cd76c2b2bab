"""One part of an audit: consecutive positions, and what the ledger says came for them.

Two proofs that do not trust each other. From ledger and manifest alone: for each position one sample came, and in a
whole epoch every kept sample came once, or a stand-in for it. Against the order, worked out anew: what came for a
position is the sample due there, or, if that is on the quarantine list, the one that the order has as its stand-in.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset import Dataset
from shards.errors import UserError
from shards.ledger import BrokenLedgerError, Frame, read_frame
from shards.mixedorder import MixedOrder, source_seed
from shards.order import ORDER_VERSION, STAND_INS, Order, Shuffle, kept_to_raw
from shards.quarantine import Place

SHOWN = 20  # misfits of each kind that are named; all are counted
KINDS = {
    "record": "a file of the ledger is missing or damaged",
    "gap": "nothing came for a position",
    "duplicate": "more than one sample came for a position",
    "wrong": "another sample came than was due",
    "missing": "a sample did not come in a whole epoch",
    "repeated": "a sample came again in an epoch",
    "stand-in": "a stand-in came that order or quarantine list do not explain",
    "quarantine": "no stand-in came where the quarantine list says so",
}
_SLICE = 1 << 22  # bits looked through at once


@dataclass(frozen=True)
class Run:
    """What a run read.

    Attributes:
        data: URLs of the data sets.
        exclude: Their drop lists.
        subset: How many samples of each, in whole shards; None: all.
        order: Identity of the order, as JSON.
    """

    data: tuple[str, ...]
    exclude: tuple[str | None, ...]
    subset: tuple[int | None, ...]
    order: str


@dataclass(frozen=True)
class Piece:
    """Frames of one rank's file, as far as they are of positions in [start, stop)."""

    path: Path
    world_size: int
    start: int
    stop: int
    offsets: list[int]


@dataclass(frozen=True)
class Span:
    """Positions [start, stop).

    Attributes:
        run: What was read.
        start: Position.
        stop: Position.
        end: Where all positions end.
        pieces: What the ledger says of these.
        listed: Of each sample on the quarantine list, the position at which it was met.
    """

    run: Run
    start: int
    stop: int
    end: int
    pieces: list[Piece]
    listed: dict[Place, int]


@dataclass
class Found:
    """What an audit found.

    Attributes:
        counts: Of misfits, by kind.
        named: The first of each kind, in words.
        records: In words, what is wrong with files: a set, since two spans may find one damaged frame.
        stand_ins: Positions for which a stand-in came.
        replaced: Numbers of the samples for which they came.
        epochs: Of a source and an epoch that goes over the edge of the span: what came of it in the span.
    """

    counts: Counter = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    records: set[str] = field(default_factory=set)
    stand_ins: int = 0
    replaced: set[int] = field(default_factory=set)
    epochs: dict[tuple[int, int], "Seen"] = field(default_factory=dict)

    def add(self, kind: str, reason: str) -> None:
        """Note a misfit."""
        self.counts[kind] += 1
        self.named[kind].append(reason)

    def take(self, other: "Found") -> None:
        """Note what was found behind this."""
        self.counts += other.counts
        for kind, reasons in other.named.items():
            self.named[kind] += reasons[: max(0, SHOWN - len(self.named[kind]))]
        self.records |= other.records
        self.stand_ins += other.stand_ins
        self.replaced |= other.replaced


class Expected:
    """What the manifests hold and what the order says.

    Samples have one number over all shards of all data sets, the sources; dropped ones too.

    Attributes:
        order: Of the run.
        sizes: int64 [sources], kept samples.
        starts: int64 [sources + 1], number of the first sample of each source.
    """

    def __init__(self, datasets: list[Dataset], order: Order | MixedOrder):
        self.order, self._datasets = order, datasets
        self._raw_sizes = np.concatenate([each.raw_sizes for each in datasets])
        self._raw_starts = np.cumsum([0, *self._raw_sizes])
        self._kept_starts = np.cumsum([0, *(size for each in datasets for size in each.shard_sizes)])
        self._first_shards = np.cumsum([0, *(len(each.raw_sizes) for each in datasets)])
        self.sizes = np.array([len(each) for each in datasets])
        self.starts = self._raw_starts[self._first_shards]
        self._dropped = [self._dropped_of(each, first) for each, first in zip(datasets, self.starts, strict=False)]
        self._all_dropped = np.concatenate(self._dropped)

    @staticmethod
    def _dropped_of(dataset: Dataset, first: int) -> np.ndarray:
        starts = first + np.cumsum([0, *dataset.raw_sizes])
        shards = np.flatnonzero(dataset.raw_sizes > dataset.shard_sizes).tolist()
        return np.concatenate([np.empty(0, int), *(starts[shard] + dataset.dropped(shard) for shard in shards)])

    def number(self, shard: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the numbers of samples, int64 [n]; -1 where there is no such sample."""
        there = (shard >= 0) & (shard < len(self._raw_sizes)) & (index >= 0)
        shard = np.where(there, shard, 0)
        return np.where(there & (index < self._raw_sizes[shard]), self._raw_starts[shard] + index, -1)

    def number_of(self, place: Place) -> int:
        """Return the number of a sample; -1 if there is none."""
        source, shard, index = place
        if not 0 <= source < len(self._datasets) or not 0 <= shard < len(self._datasets[source].raw_sizes):
            return -1
        return int(self.number(np.array(self._first_shards[source] + shard), np.array(index)))

    def source(self, number: np.ndarray) -> np.ndarray:
        """Return the sources of samples, int64 [n]."""
        return np.searchsorted(self.starts, number, side="right") - 1

    def due(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the epochs, of their sources, and the numbers of what the order has at positions; int64 [n]."""
        epoch, shard, index = self.order.locate(positions)
        return epoch, kept_to_raw(self._kept_starts[shard] + index, self._all_dropped)

    def stand_ins(self, position: int) -> Iterator[int]:
        """Yield the samples that may stand in at a position, in their order."""
        for attempt in range(1, STAND_INS + 1):
            yield int(self.due(np.array([self.order.stand_in(position, attempt)]))[1][0])

    def drawn(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return how many samples of each source come before a position: all up to, and none from; int64 [sources].

        In a mixture, the lanes draw unevenly inside a period, so the two differ.
        """
        if isinstance(self.order, Order):
            return np.array([position]), np.array([position])
        lane = np.arange(self.order.lanes)[:, None]
        following = self.order.drawn(position) * self.order.lanes + lane  # each lane's next position in each source
        last = np.where(following >= self.order.lanes, following - self.order.lanes, -1)
        return following.min(axis=0), last.max(axis=0) + 1

    def dropped(self, source: int) -> np.ndarray:
        """Return the numbers of a source's dropped samples, from its own first on, ascending."""
        return self._dropped[source] - self.starts[source]

    def name(self, number: int) -> str:
        """Return a sample in words."""
        if number < 0:
            return "a sample that is not in the data set"
        shard = int(np.searchsorted(self._raw_starts, number, side="right")) - 1
        source = int(self.source(np.asarray(number)))
        tar = self._datasets[source].paths[shard - self._first_shards[source]]
        where = f"{self._datasets[source].url}/{tar}" if len(self._datasets) > 1 else tar
        return f"sample {number - self._raw_starts[shard]} of {where}"


@lru_cache(maxsize=1)
def expected(run: Run) -> Expected:
    """Open the data sets and make the order, as a run had them.

    Raises:
        UserError: A data set is another one, or this Patchmill has another order.
    """
    datasets = [
        Dataset.open(url, exclude, subset=subset)
        for url, exclude, subset in zip(run.data, run.exclude, run.subset, strict=True)
    ]
    try:
        return _expected(datasets, json.loads(run.order))
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise UserError(f"the ledger tells no order that a run could follow ({error!r}); it is damaged") from error


def _expected(datasets: list[Dataset], order: dict[str, Any]) -> Expected:
    if type(order["seed"]) is not int:
        raise TypeError(f"its seed is {order['seed']!r}")
    if order["order_version"] != ORDER_VERSION:
        raise UserError(
            f"the run followed version {order['order_version']} of the order, this Patchmill has {ORDER_VERSION}; "
            "audit it with the Patchmill that ran it"
        )
    mixed = isinstance(order["data"], list)
    for dataset, digest in zip(datasets, order["data"] if mixed else [order["data"]], strict=True):
        if dataset.digest != digest:
            raise UserError(
                f"{dataset.url} is not the data set of the run: its digest is {dataset.digest}, was {digest}; give "
                "that one with --data, or mend it"
            )
    if not mixed:
        shuffle = Shuffle(order["lanes"], order["chunk"], order["block"])
        return Expected(datasets, Order(datasets[0].shard_sizes, order["seed"], shuffle))
    orders = [
        Order(dataset.shard_sizes, source_seed(order["seed"], s), Shuffle(order["lanes"], chunk, block))
        for s, (dataset, chunk, block) in enumerate(zip(datasets, order["chunk"], order["block"], strict=True))
    ]
    return Expected(datasets, MixedOrder(orders, order["weights"], order["seed"], period=sum(order["weights"])))


def audit_span(span: Span) -> Found:
    """Audit some positions."""
    check = _Check(span)
    for piece in span.pieces:
        for offset in piece.offsets:
            try:
                check.take(read_frame(piece.path, offset), piece)
            except BrokenLedgerError as error:
                check.found.records.add(str(error))
    check.sum_up()
    return check.found


class _Check:
    """What came for the positions of a span."""

    def __init__(self, span: Span):
        self.found, self._expected, self._span = Found(), expected(span.run), span
        self._listed = {self._expected.number_of(place): at for place, at in span.listed.items()}
        self._positions = Seen(span.stop - span.start)
        self._replaced: set[tuple[int, int]] = set()  # (position, sample)
        # A bit for each sample of each epoch that the span has some of: the epochs of one source lie together.
        before, after = self._expected.drawn(span.start)[0], self._expected.drawn(span.stop)[1]
        self._first_epochs = before // self._expected.sizes
        self._epochs = np.maximum(0, -(-after // self._expected.sizes) - self._first_epochs)
        self._widths = -(-np.diff(self._expected.starts) // 8) * 8
        self._begins = np.cumsum([0, *(self._epochs * self._widths)])
        self._samples = Seen(int(self._begins[-1]))

    def take(self, frame: Frame, piece: Piece) -> None:
        """Take in what a frame says."""
        ranks, name = piece.world_size, self._expected.name
        a, b = (max(0, -(-(position - frame.first) // ranks)) for position in (piece.start, piece.stop))
        came = self._expected.number(frame.shard[a:b], frame.index[a:b])
        positions = frame.first + np.arange(a, a + len(came)) * ranks
        again = self._positions.add(positions - self._span.start) + self._span.start
        self.found.counts["duplicate"] += len(again)
        for position in again[:SHOWN]:
            sample = name(came[positions == position][0])
            self.found.named["duplicate"].append(f"position {position}: {sample} came after another one")

        meant = came.copy()  # a stand-in counts for the sample that it replaces
        marks = frame.replaced[(frame.replaced[:, 0] >= a) & (frame.replaced[:, 0] < a + len(came))]
        rows = marks[:, 0] - a
        meant[rows] = self._expected.number(marks[:, 1], marks[:, 2])
        epoch, due = self._expected.due(positions)
        self._take_epochs(positions, epoch, meant, self._expected.source(due))

        self.found.stand_ins += len(rows)
        for row in rows:
            self._check_stand_in(int(positions[row]), int(meant[row]), int(came[row]))
        wrong = np.flatnonzero(meant != due)
        for row in wrong[:SHOWN]:
            where = f"position {positions[row]}"
            if int(due[row]) in self._listed:
                what = f"{name(came[row])} came for {name(due[row])}, not marked as a stand-in"
                self.found.add("stand-in", f"{where}: {what}")
            else:
                self.found.add("wrong", f"{where}: {name(meant[row])} came, {name(due[row])} was due")
        self.found.counts["wrong"] += max(0, len(wrong) - SHOWN)

    def _take_epochs(self, positions: np.ndarray, epoch: np.ndarray, sample: np.ndarray, source: np.ndarray) -> None:
        """Note which samples came in which epochs of their sources."""
        own = self._expected.source(sample) == source  # else it is none, or of another source, so of no epoch here
        sample, source, epoch, positions = sample[own], source[own], epoch[own], positions[own]
        inside = sample - self._expected.starts[source]
        ids = self._begins[source] + (epoch - self._first_epochs[source]) * self._widths[source] + inside
        again = self._samples.add(ids)
        self.found.counts["repeated"] += len(again)
        for twice in again[:SHOWN]:
            row = np.flatnonzero(ids == twice)[-1]
            what = f"{self._expected.name(sample[row])} came again at position {positions[row]}"
            self.found.named["repeated"].append(f"epoch {epoch[row]}: {what}")

    def _check_stand_in(self, position: int, broken: int, came: int) -> None:
        name = self._expected.name
        self._replaced.add((position, broken))
        self.found.replaced.add(broken)
        if broken not in self._listed:
            why = "which is not on the quarantine list"
        else:
            for stand_in in self._expected.stand_ins(position):
                if stand_in == came:
                    return
                if stand_in not in self._listed:
                    break
            why = f"but {name(stand_in)} was due as its stand-in"
        self.found.add("stand-in", f"position {position}: {name(came)} came in place of {name(broken)}, {why}")

    def sum_up(self) -> None:
        """Look for what did not come."""
        start, stop = self._span.start, self._span.stop
        gaps, ranges = self._positions.lacking(0, stop - start)
        self.found.counts["gap"] += gaps
        for a, b in ranges:
            where = f"position {start + a}" if b - a == 1 else f"positions {start + a} to {start + b - 1}"
            self.found.named["gap"].append(f"{where}: nothing came")
        for sample, position in self._listed.items():
            if start <= position < stop and (position, sample) not in self._replaced:
                what = f"{self._expected.name(sample)} is listed, but no stand-in came"
                self.found.add("quarantine", f"position {position}: {what}")
        self._sum_up_epochs()

    def _sum_up_epochs(self) -> None:
        """Look for samples that are missing in epochs that lie in the span, and hand out the others that get whole."""
        begun, whole, ever = (
            self._expected.drawn(position)[what]
            for position, what in ((self._span.start, 1), (self._span.stop, 0), (self._span.end, 0))
        )
        for source, size in enumerate(self._expected.sizes.tolist()):
            for i in range(int(self._epochs[source])):
                epoch = int(self._first_epochs[source]) + i
                begin = int(self._begins[source] + i * self._widths[source])
                part = self._samples.part(begin, begin + int(self._widths[source]))
                if epoch * size >= begun[source] and (epoch + 1) * size <= whole[source]:
                    note_missing(self.found, self._expected, source, epoch, part)
                elif (epoch + 1) * size <= ever[source]:
                    self.found.epochs[source, epoch] = part


def note_missing(found: Found, expected: Expected, source: int, epoch: int, came: "Seen") -> None:
    """Note which samples of a source did not come in a whole epoch."""
    first, stop = expected.starts[source : source + 2].tolist()
    came.add(expected.dropped(source))
    missing, ranges = came.lacking(0, stop - first)
    found.counts["missing"] += missing
    numbers = [number for a, b in ranges for number in range(a, min(b, a + SHOWN))][:SHOWN]
    found.named["missing"] += [f"epoch {epoch}: {expected.name(first + number)} did not come" for number in numbers]


class Seen:
    """Which of ``number`` things came: a bit for each."""

    def __init__(self, number: int):
        self.bits = np.zeros(-(-number // 8), dtype=np.uint8)

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Note what came; return what of it had come before, or comes more than once."""
        ids = np.sort(ids)
        byte, bit = ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8)
        again = (self.bits[byte] & bit) > 0
        again[1:] |= ids[1:] == ids[:-1]
        np.bitwise_or.at(self.bits, byte, bit)
        return ids[again]

    def part(self, start: int, stop: int) -> "Seen":
        """Return a part of it, from a multiple of 8 to another."""
        part = Seen(0)
        part.bits = self.bits[start // 8 : stop // 8]
        return part

    def merge(self, other: "Seen") -> np.ndarray:
        """Note what came elsewhere; return what had come here as well."""
        both = np.flatnonzero(self.bits & other.bits)
        again = np.flatnonzero(np.unpackbits((self.bits & other.bits)[both], bitorder="little"))
        self.bits = self.bits | other.bits
        return both[again // 8] * 8 + again % 8

    def lacking(self, start: int, stop: int) -> tuple[int, list[tuple[int, int]]]:
        """Return how many in [start, stop) did not come, and the first ``SHOWN`` ranges; ``start``: a multiple of 8."""
        number = 0
        ranges: list[tuple[int, int]] = []
        for a in range(start, stop, _SLICE):
            b = min(a + _SLICE, stop)
            bits = np.unpackbits(self.bits[a // 8 : -(-b // 8)], bitorder="little")[: b - a]
            edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(1), append=np.uint8(1))) + a
            number += int(len(bits) - bits.sum(dtype=np.int64))
            for lo, hi in edges[: 2 * SHOWN + 2].reshape(-1, 2).tolist():
                if ranges and ranges[-1][1] == lo:
                    ranges[-1] = ranges[-1][0], hi
                elif len(ranges) < SHOWN:
                    ranges.append((lo, hi))
        return number, ranges
