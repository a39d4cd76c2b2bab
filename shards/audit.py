"""Did each position of a run get its sample, and each sample its place in every epoch? What the ledger says to that."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.auditspan import KINDS, SHOWN, Found, Piece, Run, Seen, Span, audit_span, expected, note_missing
from shards.errors import UserError
from shards.ledger import FRAME_ROWS
from shards.lineage import Segment, find_stand, lineage
from shards.progress import ImageProgress
from shards.quarantine import Place, place_of, read_quarantine
from shards.workers import cores, run_jobs

_POSITIONS_A_WORKER = 20_000_000  # a process starts in the time that another checks these
_LEAST_SPAN = 1 << 22  # positions checked together, at least


@dataclass(frozen=True)
class Misfit:
    """Something that does not fit: its kind, one of ``KINDS``, and in words what, where."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Source:
    """A data set of a run: its URL, its kept samples, and how many whole epochs of it came."""

    url: str
    samples: int
    epochs: int


@dataclass(frozen=True)
class Audit:
    """What an audit found.

    Attributes:
        checkpoint: Whose samples these are.
        positions: That the ledger must hold: the samples consumed.
        sources: The data sets.
        ranks: Of each start in the lineage.
        stand_ins: Positions for which a stand-in came.
        replaced: Different samples for which they came.
        counts: Of the misfits, by kind; empty if all fits.
        misfits: Up to ``SHOWN`` of each kind.
    """

    checkpoint: str
    positions: int
    sources: list[Source]
    ranks: list[int]
    stand_ins: int
    replaced: int
    counts: dict[str, int]
    misfits: list[Misfit]


def audit(stage: str | Path, data: Sequence[str] = (), workers: int | None = None, progress: bool = False) -> Audit:
    """Audit the samples behind a checkpoint of a training stage.

    Args:
        stage: Folder of the stage, for its latest checkpoint; or a checkpoint in it.
        data: URLs of the data sets, all of a mixture, if one has moved.
        workers: Processes; by default one for each core this process may use, as far as starting them pays.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: There is no checkpoint with a ledger, its data sets are not to be had, or this Patchmill has another
            order than the run's; or the ledger tells what cannot be.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    expected.cache_clear()  # a data set may have changed since the last call
    stand = find_stand(Path(stage))
    folder = stand.checkpoint.parent.parent
    segments, problems = lineage(folder / "ledger", stand)
    if not segments:
        raise UserError(f"no ledger in {folder} for {stand.checkpoint.name}: {'; '.join(problems)}")
    reach = max((int(file.last.max()) for each in segments for file in each.files if len(file.last)), default=0)
    if stand.samples > 2 * reach + _LEAST_SPAN:
        raise UserError(
            f"{stand.checkpoint} stands at {stand.samples:,} samples, and {folder / 'ledger'} tells of {reach:,}: most "
            f"of it is missing, or one of them is damaged{''.join(f'; {each}' for each in problems[:3])}"
        )
    run = _run(segments[-1].head["run"], data)
    listed = {place_of(entry): entry["position"] for entry in read_quarantine(folder / "quarantine.jsonl")}
    found = _audit(run, segments, stand.samples, listed, workers, progress)
    found.records |= set(problems)
    for reason in sorted(found.records):
        found.add("record", reason)
    sizes, epochs = expected(run).sizes, expected(run).drawn(stand.samples)[0] // expected(run).sizes
    return Audit(
        checkpoint=str(stand.checkpoint),
        positions=stand.samples,
        sources=[Source(*each) for each in zip(run.data, sizes.tolist(), epochs.tolist(), strict=True)],
        ranks=[segment.head["world_size"] for segment in segments],
        stand_ins=found.stand_ins,
        replaced=len(found.replaced),
        counts={kind: found.counts[kind] for kind in KINDS if found.counts[kind]},
        misfits=[Misfit(kind, reason) for kind in KINDS for reason in found.named[kind][:SHOWN]],
    )


def _run(run: dict, data: Sequence[str]) -> Run:
    if data and len(data) != len(run["data"]):
        raise UserError(f"--data is given {len(data)} times, the run read {len(run['data'])}: {', '.join(run['data'])}")
    subset = run.get("subset", [None] * len(run["exclude"]))
    return Run(tuple(data or run["data"]), tuple(run["exclude"]), tuple(subset), json.dumps(run["order"]))


def _audit(
    run: Run, segments: list[Segment], end: int, listed: dict[Place, int], workers: int | None, progress: bool
) -> Found:
    """Audit all positions, span by span."""
    found = Found()
    open_epochs: dict = {}
    ended: dict[int, tuple[Span, Found]] = {}  # by their starts; spans may end before those in front of them
    at = 0
    workers = workers or max(1, min(cores(), end // _POSITIONS_A_WORKER))
    with ImageProgress("auditing", end, rejected="misfits", show=progress) as bar:
        for span, part in run_jobs(audit_span, _spans(run, segments, end, listed), workers):
            bar.advance(span.stop - span.start, 0, part.counts.total())
            ended[span.start] = span, part
            while at in ended:
                span, part = ended.pop(at)
                found.take(part)
                _join(part.epochs, open_epochs, span, found)
                at = span.stop
    return found


def _join(
    parts: dict[tuple[int, int], Seen], open_epochs: dict[tuple[int, int], Seen], span: Span, found: Found
) -> None:
    """Put together what came of the epochs that several spans have some of; look into those that end with this one."""
    manifest = expected(span.run)
    for (source, epoch), part in parts.items():
        again = open_epochs.setdefault((source, epoch), Seen(8 * len(part.bits))).merge(part)
        found.counts["repeated"] += len(again)
        names = [manifest.name(int(manifest.starts[source]) + number) for number in again[:SHOWN].tolist()]
        found.named["repeated"] += [f"epoch {epoch}: {name} came again before position {span.stop}" for name in names]
    whole = manifest.drawn(span.stop)[0] // manifest.sizes
    for source, epoch in [key for key in open_epochs if key[1] < whole[key[0]]]:
        note_missing(found, manifest, source, epoch, open_epochs.pop((source, epoch)))


def _spans(run: Run, segments: list[Segment], end: int, listed: dict[Place, int]) -> Iterator[Span]:
    """Cut positions up to ``end`` into spans of whole epochs, so few that a frame is seldom read twice."""
    samples = expected(run).order.samples
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
        yield Span(run, start, stop, end, pieces, listed)
