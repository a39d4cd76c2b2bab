"""Checkpoints: a folder that appears whole or not at all, and that any number of ranks and either engine reads.

Layout of ``checkpoints/``::

    samples-000000051200/rank-00000.safetensors ...   the flat fp32 pieces of each rank, ``KIND/PARAMETER@START``
    samples-000000051200/checkpoint.json              files with sizes and checksums, shapes, run state; written last
    latest, best                                      one line each: the name of a folder
"""

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeline import checksum, distributed
from pipeline.checkpointindex import FORMAT_VERSION, BrokenCheckpointError, index_text, read_index
from pipeline.engines.fragments import MissingPieceError, Piece
from pipeline.mapped import Mapped
from pipeline.rankfile import write_rank_file
from shards.atomic import commit_folder, fsync_folder, partial_folder, write_text
from shards.errors import PatchmillError, UserError

NAMES = "samples-" + 12 * "[0-9]"
"""Of the folders of checkpoints, as a glob has them; all others are not looked at."""
_PIECE = re.compile(r"([^/]*)/(.*)@([0-9]{1,18})", re.DOTALL)


def save(
    folder: Path,
    samples: int,
    pieces: Iterable[Piece],
    shapes: dict[str, tuple],
    state: dict[str, Any],
    best: bool = False,
    size: int = 0,
    group: ProcessGroup | None = None,
) -> Path:
    """Write the checkpoint of ``samples`` consumed; collective over all ranks.

    Args:
        folder: The run's ``checkpoints`` folder.
        samples: Samples consumed so far: where the run stands.
        pieces: This rank's pieces.
        shapes: Full shape of every parameter, by name.
        state: What else a resume needs, as plain JSON values; rank 0's counts.
        best: Whether the pointer ``best`` moves to this checkpoint too.
        size: Bytes that all ranks' files will take, at least.
        group: Over which the ranks agree; by default that of everything else.

    Returns:
        The checkpoint's final path.

    Raises:
        PatchmillError: On all ranks, where one of them cannot write its part; nothing is left of it then.
    """
    rank = distributed.rank()
    final = path_of(folder, samples)
    partial = folder / f".{final.name}.partial"

    def begin() -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            fsync_folder(folder.parent)
        check_room(folder, size)
        partial_folder(final)

    def write_mine() -> dict[str, Any]:
        if not partial.is_dir():
            raise OSError(f"rank {rank} does not see what rank 0 made; all ranks need the same run folder")
        return write_rank_file(partial / f"rank-{rank:05d}.safetensors", pieces, shapes)

    def commit() -> None:
        for file in files:
            if (partial / file["name"]).stat().st_size != file["bytes"]:
                raise OSError(f"{file['name']} is not what its rank wrote")
        index = {
            "format_version": FORMAT_VERSION,
            "samples": samples,
            "world_size": distributed.world_size(),
            "files": files,
            "shapes": {name: list(shape) for name, shape in shapes.items()},
            "state": state,
        }
        write_text(partial / "checkpoint.json", index_text(index))
        commit_folder(partial, final)
        write_text(folder / "latest", final.name + "\n")
        if best:
            write_text(folder / "best", final.name + "\n")

    try:
        together(final, begin, rank == 0, group)
        files = together(final, write_mine, True, group)
        together(final, commit, rank == 0, group)
    except PatchmillError:
        if rank == 0:  # nobody writes any more
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


def together(
    final: Path,
    action: Callable[[], Any],
    mine: bool,
    group: ProcessGroup | None = None,
    doing: str = "write checkpoint",
) -> list[Any]:
    """Do one step of a save where it is this rank's to do; return what it gave each rank. Of one, all raise an error.

    Args:
        final: The checkpoint, for the error.
        action: The step.
        mine: Whether this rank does it.
        group: Over which the ranks agree.
        doing: What is done to ``final``, for the error.
    """
    error = found = None
    try:
        found = action() if mine else None
    except Exception as problem:  # noqa: BLE001 (told to all: none may be left waiting)
        told = f"cannot {doing} {final}: {problem or type(problem).__name__}"
        known = isinstance(problem, PatchmillError)
        error = problem if known else PatchmillError(f"{told}; make room or mend the disk, then run again")
    founds = distributed.everyone((found, error), group)
    errors = [problem for _, problem in founds if problem is not None]
    if errors:
        raise error or errors[0]
    return [each for each, _ in founds]


def check_room(folder: Path, size: int) -> None:
    """Raise a PatchmillError unless the disk that ``folder`` is on, or will be, has room for ``size`` bytes."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    if (free := shutil.disk_usage(there).free) < size:
        raise PatchmillError(
            f"a checkpoint in {folder} takes {size / 1e9:.3g} GB, and {free / 1e9:.3g} GB of its disk are free; make "
            "room, set a smaller checkpoint.keep, or give --out on another disk"
        )


def prune(folder: Path, keep: int, every: int | None = None, in_use: Path | None = None) -> None:
    """Delete checkpoints that are of no more use; rank 0 alone calls it, after a save.

    Args:
        folder: The run's ``checkpoints`` folder.
        keep: So many of the newest stay; ``latest`` and ``best`` do, too.
        every: Samples; the first checkpoint at or after each multiple of it stays for good.
        in_use: One that stays this time.
    """
    latest, best = pointer(folder, "latest"), pointer(folder, "best")
    there = whole_checkpoints(folder)
    names = [each.name for each in there]
    gone = superseded(names, latest.name if latest else None, best.name if best else None, keep, every)
    for old in there:
        # What is newer than the latest was broken: the run went on from the one before.
        newer = latest is not None and old > latest and old != best
        if (old.name in gone or newer) and old != in_use:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(f".{old.name}.partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def superseded(
    there: Iterable[str], latest: str | None, best: str | None, keep: int, every: int | None = None
) -> set[str]:
    """Return which checkpoints are of no more use since newer ones were saved, by their names.

    Args:
        there: Names of all that there are.
        latest: That of the last one that was saved; what is newer neither counts nor is of no more use.
        best: That of the best one, which stays.
        keep: So many of the newest stay.
        every: Samples; the first checkpoint at or after each multiple of it stays.
    """
    names = sorted(name for name in there if latest is None or name <= latest)
    stay = {latest, best, *names[-keep:]}
    if every is not None:
        periods = {samples_of(Path(name)) // every: name for name in reversed(names)}
        stay |= {name for period, name in periods.items() if period > 0}
    return set(names) - stay


def clear_partial(folder: Path) -> None:
    """Remove what killed saves left behind; rank 0 alone calls it, before the first step."""
    for partial in folder.glob(".samples-*.partial"):
        shutil.rmtree(partial)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that were committed, newest first."""
    return sorted((path.parent for path in folder.glob(f"{NAMES}/checkpoint.json")), reverse=True)


def path_of(folder: Path, samples: int) -> Path:
    """Return where the checkpoint of so many samples is."""
    return folder / f"samples-{samples:012d}"


def samples_of(path: Path) -> int:
    """Return the samples consumed at a checkpoint, by its name."""
    return int(path.name.removeprefix("samples-"))


def pointer(folder: Path, name: str) -> Path | None:
    """Return the checkpoint that ``latest`` or ``best`` names, or None."""
    try:
        target = folder / (folder / name).read_text().strip()
        return target if (target / "checkpoint.json").is_file() else None
    except (OSError, ValueError):  # it is not there, or damaged
        return None


class Checkpoint:
    """A whole checkpoint on disk, read piece by piece.

    Attributes:
        path: Its folder.
        format_version, samples, world_size, files, shapes, state: As in ``checkpointindex.Index``.

    Raises:
        BrokenCheckpointError: Its index is missing or damaged; likewise of all that reads its files.
        UserError: A newer Patchmill wrote it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            text = (path / "checkpoint.json").read_bytes()
        except OSError as error:
            raise BrokenCheckpointError(
                f"{path} has no readable checkpoint.json: {error.strerror}; use another checkpoint"
            ) from None
        index = read_index(text, path)
        self.format_version, self.samples, self.world_size, self.files, self.shapes, self.state = index
        self._where: dict[tuple[str, str], list[tuple[int, int, str]]] = {}  # start, stop and file of the pieces
        self._files = Mapped(_open)

    def verify(self, files: list[dict] | None = None) -> None:
        """Check sizes and checksums of all files, or of the given ones; raise BrokenCheckpointError."""
        for file in self.files if files is None else files:
            self.verify_sizes([file])
            path = self.path / file["name"]
            with _reading(path):
                matches = checksum.matches(path, file)
            if not matches:
                raise BrokenCheckpointError(
                    f"{path} does not have the checksum it was written with; use another checkpoint"
                )

    def verify_sizes(self, files: list[dict] | None = None) -> None:
        """Check that all files, or the given ones, are there and as long as they were; raise BrokenCheckpointError."""
        for file in self.files if files is None else files:
            path = self.path / file["name"]
            with _reading(path):
                whole = path.is_file() and path.stat().st_size == file["bytes"]
            if not whole:
                raise BrokenCheckpointError(f"{path} is missing or cut short; use another checkpoint")

    def counts(self) -> dict[tuple[str, str], int]:
        """Return of each (kind, parameter) how many values there are."""
        return {key: sum(stop - start for start, stop, _ in parts) for key, parts in self._pieces().items()}

    def read(self, kind: str, parameter: str, start: int, count: int) -> Tensor:
        """Return values [start, start + count) of a flattened parameter's kind, float32, whichever ranks wrote them.

        Those of one piece are not copied: they are the file's, mapped, and to be copied to wherever they are kept.

        Raises:
            MissingPieceError: The checkpoint lacks some of them.
        """
        parts, at = [], start
        for piece_start, stop, file in self._pieces().get((kind, parameter), []):
            if piece_start <= at < stop and at < start + count:
                until = min(stop, start + count)
                piece = self._opened(file).get_slice(f"{kind}/{parameter}@{piece_start}")
                parts.append(self._files.counted(piece[at - piece_start : until - piece_start]))
                at = until
        if at < start + count:
            raise MissingPieceError(
                f"checkpoint {self.path} holds no {kind} of {parameter} at [{at}, {start + count}); "
                "it is of another model or optimizer: use the settings that wrote it"
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def close(self) -> None:
        """Let go of the files; another read opens them again."""
        self._files.close()

    def _opened(self, name: str) -> Any:
        return self._files(self.path / name)

    def _pieces(self) -> dict[tuple[str, str], list[tuple[int, int, str]]]:
        """Return of each (kind, parameter) where its pieces start and stop, in their order, and which file has each."""
        if not self._where:
            found: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
            for name in (file["name"] for file in self.files):
                opened = self._opened(name)
                for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    piece = _PIECE.fullmatch(key)
                    kept = opened.get_slice(key)
                    if piece is None or len(kept.get_shape()) != 1 or kept.get_dtype() != "F32":
                        raise BrokenCheckpointError(
                            f"{self.path / name} holds {key!r}, which is no flat float32 piece; use another checkpoint"
                        )
                    kind, parameter, start = piece.groups()
                    stop = int(start) + kept.get_shape()[0]
                    found.setdefault((kind, parameter), []).append((int(start), stop, name))
            self._where = {key: sorted(pieces) for key, pieces in found.items()}
        return self._where


def _open(path: Path) -> Any:
    with _reading(path):
        return safe_open(path, framework="pt")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what fails while a file is read into the error that lets another checkpoint be tried."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or error
        raise BrokenCheckpointError(f"{path} cannot be read: {told}; use another checkpoint") from None


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that passes verification, or None; collective, and the ranks share the checking.

    A broken one is passed over with a warning, so that a damaged file costs some steps and not the run.
    """
    return first_whole(whole_checkpoints(folder))


def first_whole(candidates: list[Path]) -> Checkpoint | None:
    """Return the first of some checkpoints that passes verification, or None, as ``newest`` does.

    Raises:
        UserError: A newer Patchmill wrote one, which is no reason to go on from one before.
    """
    candidates = distributed.everyone(candidates)[0]
    for candidate in candidates:
        problem = None
        try:
            checkpoint = Checkpoint(candidate)
            checkpoint.verify(checkpoint.files[distributed.rank() :: distributed.world_size()])
        except PatchmillError as error:
            problem = error
        problems = [each for each in distributed.everyone(problem) if each is not None]
        if not problems:
            return checkpoint
        for each in problems:
            if isinstance(each, UserError):
                raise each
        if distributed.rank() == 0:
            print(passed_over(problems[0], candidate != candidates[-1]), file=sys.stderr, flush=True)
    return None


def passed_over(problem: Exception, more: bool) -> str:
    """Return the warning that a checkpoint is not used; ``more``: there is another to try."""
    return f"warning: {problem}{' (falling back to the one before)' if more else ''}"
