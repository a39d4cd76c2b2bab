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

import numpy as np

from shards.dataset import Dataset
from shards.errors import UserError
from shards.ledger import BrokenLedgerError, Frame, read_frame
from shards.order import ORDER_VERSION, STAND_INS, Order, Shuffle, kept_to_raw

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

Source = tuple[str, str | None, str]
"""URL of the data set, drop list, and identity of the order as JSON."""


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
    """Positions [start, stop), from the first of an epoch on.

    Attributes:
        source: What the run read.
        start: Position.
        stop: Position.
        pieces: Where they are written.
        listed: By shard and raw index of each sample on the quarantine list, the position at which it was met.
    """

    source: Source
    start: int
    stop: int
    pieces: list[Piece]
    listed: dict[tuple[int, int], int]


@dataclass
class Found:
    """What an audit found.

    Attributes:
        counts: Of misfits, by kind.
        named: The first of each kind, in words.
        records: In words, what is wrong with files: a set, since two spans may find one damaged frame.
        stand_ins: Positions for which a stand-in came.
        replaced: Numbers of the samples for which they came.
    """

    counts: Counter = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    records: set[str] = field(default_factory=set)
    stand_ins: int = 0
    replaced: set[int] = field(default_factory=set)

    def add(self, kind: str, reason: str) -> None:
        """Note a misfit."""
        self.counts[kind] += 1
        self.named[kind].append(reason)

    def take(self, other: "Found") -> None:
        """Note what was found behind this."""
        self.counts += other.counts
        for kind, reasons in other.named.items():
            self.named[kind] += reasons[: SHOWN - len(self.named[kind])]
        self.records |= other.records
        self.stand_ins += other.stand_ins
        self.replaced |= other.replaced


class Expected:
    """What the manifest holds and what the order says. Samples have one number over all shards, dropped ones too."""

    def __init__(self, dataset: Dataset, order: Order):
        self.order, self._dataset = order, dataset
        self._raw_starts = np.concatenate([[0], np.cumsum(dataset.raw_sizes)])
        self._kept_starts = np.concatenate([[0], np.cumsum(dataset.shard_sizes)])
        self.raw_samples = int(self._raw_starts[-1])
        shards = np.flatnonzero(dataset.raw_sizes > dataset.shard_sizes).tolist()
        self.dropped = np.concatenate([np.empty(0, int), *(self._raw_starts[s] + dataset.dropped(s) for s in shards)])

    def number(self, shard: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return the numbers of samples, int64 [n]; -1 where there is no such sample."""
        there = (shard >= 0) & (shard < len(self._dataset.raw_sizes)) & (index >= 0)
        shard = np.where(there, shard, 0)
        return np.where(there & (index < self._dataset.raw_sizes[shard]), self._raw_starts[shard] + index, -1)

    def due(self, positions: np.ndarray) -> np.ndarray:
        """Return the numbers of the samples that the order has at positions, int64 [n]."""
        _, shard, index = self.order.locate(positions)
        return kept_to_raw(self._kept_starts[shard] + index, self.dropped)

    def stand_ins(self, position: int) -> Iterator[int]:
        """Yield the samples that may stand in at a position, in their order."""
        for attempt in range(1, STAND_INS + 1):
            yield int(self.due(np.array([self.order.stand_in(position, attempt)]))[0])

    def name(self, number: int) -> str:
        """Return a sample in words."""
        if number < 0:
            return "a sample that is not in the data set"
        shard = int(np.searchsorted(self._raw_starts, number, side="right")) - 1
        return f"sample {number - self._raw_starts[shard]} of {self._dataset.paths[shard]}"


@lru_cache(maxsize=1)
def expected(data: str, exclude: str | None, identity: str) -> Expected:
    """Open a data set and make its order, as a run had them.

    Raises:
        UserError: It is another data set, or this Patchmill has another order.
    """
    order = json.loads(identity)
    if order["order_version"] != ORDER_VERSION:
        raise UserError(
            f"the run followed version {order['order_version']} of the order, this Patchmill has {ORDER_VERSION}; "
            "audit it with the Patchmill that ran it"
        )
    dataset = Dataset.open(data, exclude)
    if dataset.digest != order["data"]:
        raise UserError(f"{data} is not the data set of the run: its digest is {dataset.digest}, was {order['data']}")
    shuffle = Shuffle(order["lanes"], order["chunk"], order["block"])
    return Expected(dataset, Order(dataset.shard_sizes, order["seed"], shuffle))


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
        self.found = Found()
        self._expected = expected(*span.source)
        self._start, self._stop = span.start, span.stop
        self._epoch = self._expected.order.samples
        self._listed = {int(self._expected.number(*np.array(place))): at for place, at in span.listed.items()}
        self._width = -(-self._expected.raw_samples // 8) * 8  # of an epoch: whole bytes
        self._positions = _Seen(span.stop - span.start)
        self._samples = _Seen(-(-(span.stop - span.start) // self._epoch) * self._width)
        self._replaced: set[tuple[int, int]] = set()  # (position, sample)

    def take(self, frame: Frame, piece: Piece) -> None:
        """Take in what a frame says."""
        ranks, name = piece.world_size, self._expected.name
        a, b = (max(0, -(-(position - frame.first) // ranks)) for position in (piece.start, piece.stop))
        came = self._expected.number(frame.shard[a:b], frame.index[a:b])
        positions = frame.first + np.arange(a, a + len(came)) * ranks
        again = self._positions.add(positions - self._start) + self._start
        self.found.counts["duplicate"] += len(again)
        for position in again[:SHOWN]:
            sample = name(came[positions == position][0])
            self.found.named["duplicate"].append(f"position {position}: {sample} came after another one")

        meant = came.copy()  # a stand-in counts for the sample that it replaces
        marks = frame.replaced[(frame.replaced[:, 0] >= a) & (frame.replaced[:, 0] < a + len(came))]
        rows = marks[:, 0] - a
        meant[rows] = self._expected.number(marks[:, 1], marks[:, 2])
        there = meant >= 0
        epochs = positions // self._epoch - self._start // self._epoch
        ids = epochs[there] * self._width + meant[there]
        again = self._samples.add(ids)
        self.found.counts["repeated"] += len(again)
        for twice in again[:SHOWN]:
            at, sample = positions[there][ids == twice][-1], name(twice % self._width)
            self.found.named["repeated"].append(f"epoch {at // self._epoch}: {sample} came again at position {at}")

        due = self._expected.due(positions)
        self.found.stand_ins += len(rows)
        for row in rows:
            self._check_stand_in(int(positions[row]), int(meant[row]), int(came[row]))
        wrong = np.flatnonzero(meant != due)
        for row in wrong[:SHOWN]:
            position = int(positions[row])
            if int(due[row]) in self._listed:
                self.found.add(
                    "stand-in",
                    f"position {position}: {name(came[row])} came for {name(due[row])}, not marked as a stand-in",
                )
            else:
                self.found.add("wrong", f"position {position}: {name(meant[row])} came, {name(due[row])} was due")
        if len(wrong) > SHOWN:
            self.found.counts["wrong"] += len(wrong) - SHOWN

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
        gaps, first = self._positions.lacking(0, self._stop - self._start)
        self.found.counts["gap"] += gaps
        for a, b in first:
            where = (
                f"position {a + self._start}" if b - a == 1 else f"positions {a + self._start} to {b + self._start - 1}"
            )
            self.found.named["gap"].append(f"{where}: nothing came")
        for epoch in range((self._stop - self._start) // self._epoch):
            begin = epoch * self._width
            self._samples.add(begin + self._expected.dropped)
            missing, first = self._samples.lacking(begin, begin + self._expected.raw_samples)
            self.found.counts["missing"] += missing
            names = [self._expected.name(i - begin) for a, b in first for i in range(a, min(b, a + SHOWN))]
            number = self._start // self._epoch + epoch
            self.found.named["missing"] += [f"epoch {number}: {name} did not come" for name in names]
        for sample, position in self._listed.items():
            if self._start <= position < self._stop and (position, sample) not in self._replaced:
                self.found.add(
                    "quarantine",
                    f"position {position}: {self._expected.name(sample)} is listed, but no stand-in came",
                )


class _Seen:
    """Which of ``number`` things came: a bit for each."""

    def __init__(self, number: int):
        self._bits = np.zeros(-(-number // 8), dtype=np.uint8)

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Note what came; return what of it had come before, or comes more than once."""
        ids = np.sort(ids)
        byte, bit = ids >> 3, np.left_shift(1, ids & 7).astype(np.uint8)
        again = (self._bits[byte] & bit) > 0
        again[1:] |= ids[1:] == ids[:-1]
        np.bitwise_or.at(self._bits, byte, bit)
        return ids[again]

    def lacking(self, start: int, stop: int) -> tuple[int, list[tuple[int, int]]]:
        """Return how many in [start, stop) did not come, and the first ``SHOWN`` ranges of them."""
        number, ranges = 0, []
        for a in range(start, stop, _SLICE):
            b = min(a + _SLICE, stop)
            bits = np.unpackbits(self._bits[a // 8 : -(-b // 8)], bitorder="little")[a % 8 :][: b - a]
            edges = np.flatnonzero(np.diff(bits, prepend=np.uint8(1), append=np.uint8(1))) + a
            number += int(len(bits) - bits.sum(dtype=np.int64))
            for lo, hi in edges[: 2 * SHOWN + 2].reshape(-1, 2).tolist():
                if ranges and ranges[-1][1] == lo:
                    ranges[-1] = ranges[-1][0], hi
                elif len(ranges) < SHOWN:
                    ranges.append((lo, hi))
        return number, ranges
