"""Which segments of a ledger are behind some weights: from the checkpoint back, start by start."""

import json
from dataclasses import dataclass
from pathlib import Path

from shards.errors import UserError
from shards.ledger import BrokenLedgerError, RankFile, is_segment, rank_path


@dataclass(frozen=True)
class Stand:
    """Where the data stream of a checkpoint stood: ``samples`` positions, the last of them delivered by ``segment``."""

    checkpoint: Path
    samples: int
    segment: str | None


@dataclass(frozen=True)
class Segment:
    """What was delivered from one start on. Of its ``files``, positions from ``start`` on up to ``stop`` count."""

    start: int
    stop: int
    files: list[RankFile]

    @property
    def head(self) -> dict:
        """What is said of the segment in each of its files."""
        return self.files[0].head


def find_stand(stage: Path) -> Stand:
    """Read where the stream stood in a checkpoint, or in the newest one of a stage's folder.

    Raises:
        UserError: There is no such checkpoint, or it tells nothing of a ledger.
    """
    checkpoint = stage
    if not (stage / "checkpoint.json").is_file():
        checkpoints = stage / "checkpoints"
        latest = checkpoints / "latest"
        whole = sorted(path.parent for path in checkpoints.glob("samples-*/checkpoint.json"))
        if not whole:
            raise UserError(f"{stage} has no checkpoint; give the folder of a training stage, or a checkpoint in it")
        named = checkpoints / latest.read_text(errors="replace").strip() if latest.is_file() else None
        checkpoint = named if named in whole else whole[-1]
    try:
        loader = json.loads((checkpoint / "checkpoint.json").read_text())["state"]["loader"]
        samples, segment = loader["samples"], loader["ledger"]
        if type(samples) is not int or samples < 0 or not (segment is None or is_segment(segment)):
            raise ValueError(f"{samples!r} in {segment!r}")
        return Stand(checkpoint, samples, segment)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{checkpoint} tells no segment of a ledger; it was written without one") from None


def lineage(ledger: Path, stand: Stand) -> tuple[list[Segment], list[str]]:
    """Return the segments behind a checkpoint, the first start first, and in words what is wrong with their files."""
    segments: list[Segment] = []
    problems: list[str] = []
    name, stop, seen = stand.segment, stand.samples, set()
    while name is not None:
        if name in seen:
            problems.append(f"segment {name} goes on from itself")
            break
        seen.add(name)
        files = _files(ledger / name, problems)
        if not files:
            problems.append(f"segment {name} has no file that can be read")
            break
        segment = Segment(min(files[0].head["begins"], stop), stop, files)
        if segment.start < files[0].head["begins"]:
            problems.append(
                f"segment {name} begins at position {files[0].head['begins']}, behind {stop} where it was left"
            )
        for file in files:
            reached = int(file.last[-1]) + segment.head["world_size"] if len(file.last) else segment.start
            if file.torn and reached < stop:
                problems.append(f"{file.path} is no ledger any more behind byte {file.end}")
        if segments and _order(segment) != _order(segments[0]):
            problems.append(f"segment {name} is of other data or another order than what came after it")
        segments.insert(0, segment)
        name, stop = segment.head["after"], segment.start
    if segments and stop > 0 and name is None:
        problems.append(f"there is no record of the positions before {stop}")
    return segments, problems


def _order(segment: Segment) -> dict:
    return {key: value for key, value in segment.head["run"].items() if key != "data"}  # which may have moved


def _files(folder: Path, problems: list[str]) -> list[RankFile]:
    """Read the files of a segment that are whole and belong together."""
    files: dict[int, RankFile] = {}
    for path in sorted(folder.glob("rank-*.ledger")):
        try:
            file = RankFile(path)
        except BrokenLedgerError as error:
            problems.append(str(error))
            continue
        first = next(iter(files.values()), file)
        fits = path == rank_path(folder, file.head["rank"]) and {**file.head, "rank": 0} == {**first.head, "rank": 0}
        if fits and file.head["rank"] < file.head["world_size"]:
            files[file.head["rank"]] = file
        else:
            problems.append(f"{path} does not belong to the other files of its segment")
    if files:
        ranks = next(iter(files.values())).head["world_size"]
        problems += [f"{folder} has no file of rank {r} of {ranks}" for r in range(ranks) if r not in files]
    return list(files.values())
