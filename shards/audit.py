"""Did each position of a run get its sample, and each sample its place in every epoch? What the ledger says to that."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.auditspan import KINDS, SHOWN, Found, Piece, Source, Span, audit_span, expected
from shards.errors import UserError
from shards.ledger import FRAME_ROWS
from shards.lineage import Segment, find_stand, lineage
from shards.progress import ImageProgress
from shards.quarantine import read_quarantine
from shards.workers import cores, run_jobs

_POSITIONS_A_WORKER = 20_000_000  # a process starts in the time that another checks these
_LEAST_SPAN = 1 << 22  # positions checked together, at least


@dataclass(frozen=True)
class Misfit:
    """Something that does not fit: its kind, one of ``KINDS``, and in words what, where."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        data: URL of the data set.
        checkpoint: Whose samples these are.
        positions: That the ledger must hold: the samples consumed.
        epochs: Whole ones in them.
        samples: Kept ones of the data set: positions of an epoch.
        ranks: Of each start in the lineage.
        stand_ins: Positions for which a stand-in came.
        replaced: Different samples for which they came.
        counts: Of the misfits, by kind; empty if all fits.
        misfits: Up to ``SHOWN`` of each kind.
    """

    data: str
    checkpoint: str
    positions: int
    epochs: int
    samples: int
    ranks: list[int]
    stand_ins: int
    replaced: int
    counts: dict[str, int]
    misfits: list[Misfit]


def audit(stage: str | Path, data: str | None = None, workers: int | None = None, progress: bool = False) -> Audit:
    """Audit the samples behind a checkpoint of a training stage.

    Args:
        stage: Folder of the stage, for its latest checkpoint; or a checkpoint in it.
        data: URL of the data set, if it has moved.
        workers: Processes; by default one for each core this process may use, as far as starting them pays.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: There is no checkpoint with a ledger, its data set is not to be had, or this Patchmill has another
            order than the run's.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    expected.cache_clear()  # the data set may have changed since the last call
    stand = find_stand(Path(stage))
    folder = stand.checkpoint.parent.parent
    segments, problems = lineage(folder / "ledger", stand)
    if not segments:
        raise UserError(f"no ledger in {folder} for {stand.checkpoint.name}: {'; '.join(problems)}")
    run = segments[-1].head["run"]
    source = data or run["data"], run["exclude"], json.dumps(run["order"])
    samples = expected(*source).order.samples
    listed = {(each["shard"], each["index"]): each["position"] for each in read_quarantine(folder / "quarantine.jsonl")}

    found = Found(records=set(problems))
    parts: dict[int, Found] = {}
    spans = _spans(source, segments, samples, stand.samples, listed)
    workers = workers or max(1, min(cores(), stand.samples // _POSITIONS_A_WORKER))
    with ImageProgress("auditing", stand.samples, rejected="misfits", show=progress) as bar:
        for span, part in run_jobs(audit_span, spans, workers):
            parts[span.start] = part
            bar.advance(span.stop - span.start, 0, part.counts.total())
    for start in sorted(parts):
        found.take(parts[start])
    for reason in sorted(found.records):
        found.add("record", reason)
    return Audit(
        data=source[0],
        checkpoint=str(stand.checkpoint),
        positions=stand.samples,
        epochs=stand.samples // samples,
        samples=samples,
        ranks=[segment.head["world_size"] for segment in segments],
        stand_ins=found.stand_ins,
        replaced=len(found.replaced),
        counts={kind: found.counts[kind] for kind in KINDS if found.counts[kind]},
        misfits=[Misfit(kind, reason) for kind in KINDS for reason in found.named[kind][:SHOWN]],
    )


def _spans(
    source: Source, segments: list[Segment], samples: int, end: int, listed: dict[tuple[int, int], int]
) -> Iterator[Span]:
    """Cut positions up to ``end`` into spans of whole epochs, so few that a frame is seldom read twice."""
    most_ranks = max(segment.head["world_size"] for segment in segments)
    length = -(-max(_LEAST_SPAN, 4 * FRAME_ROWS * most_ranks) // samples) * samples
    for start in range(0, end, length):
        stop = min(start + length, end)
        pieces = []
        for segment in segments:
            a, b = max(start, segment.start), min(stop, segment.stop)
            for file in segment.files if a < b else ():
                offsets = file.offset[(file.first < b) & (file.last >= a)].tolist()
                pieces.append(Piece(file.path, segment.head["world_size"], a, b, offsets))
        yield Span(source, start, stop, pieces, listed)
