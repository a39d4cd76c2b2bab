"""Checkpoints: a folder that appears whole or not at all, and that any number of ranks and either engine reads.

Layout of ``checkpoints/``::

    samples-000000051200/rank-00000.safetensors ...   the flat fp32 pieces of each rank, ``KIND/PARAMETER@START``
    samples-000000051200/checkpoint.json              files with sizes and checksums, shapes, run state; written last
    latest, best                                      one line each: the name of a folder
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeline import distributed
from pipeline.engines.fragments import MissingPieceError, Piece
from pipeline.mapped import Mapped
from pipeline.rankfile import write_rank_file
from shards.atomic import commit_folder, fsync_folder, partial_folder, write_text
from shards.errors import PatchmillError, UserError

FORMAT_VERSION = 1


class BrokenCheckpointError(PatchmillError):
    """A checkpoint whose files are missing, cut short or altered."""


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
        write_text(partial / "checkpoint.json", json.dumps(index, indent=1))
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


def together(final: Path, action: Callable[[], Any], mine: bool, group: ProcessGroup | None = None) -> list[Any]:
    """Do one step of a save where it is this rank's to do; return what it gave each rank. Of one, all raise an error.

    Args:
        final: The checkpoint, for the error.
        action: The step.
        mine: Whether this rank does it.
        group: Over which the ranks agree.
    """
    error = found = None
    try:
        found = action() if mine else None
    except Exception as problem:  # noqa: BLE001 (told to all: none may be left waiting)
        told = f"cannot write checkpoint {final}: {problem or type(problem).__name__}"
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
    stay = kept([samples_of(each) for each in there if latest is None or each <= latest], keep, every)
    for old in there:
        # What is newer than the latest was broken: the run went on from the one before.
        if samples_of(old) not in stay and old not in (latest, best, in_use):
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(f".{old.name}.partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def kept(there: list[int], keep: int, every: int | None) -> set[int]:
    """Return which checkpoints stay, by their samples: so many of the newest, and the first of each period."""
    stay = set(sorted(there)[-keep:])
    if every is not None:
        first = {samples // every: samples for samples in sorted(there, reverse=True) if samples >= every}
        stay |= set(first.values())
    return stay


def clear_partial(folder: Path) -> None:
    """Remove what killed saves left behind; rank 0 alone calls it, before the first step."""
    for partial in folder.glob(".samples-*.partial"):
        shutil.rmtree(partial)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that were committed, newest first."""
    return sorted((path.parent for path in folder.glob("samples-*/checkpoint.json")), reverse=True)


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
    except FileNotFoundError:
        return None
    return target if (target / "checkpoint.json").is_file() else None


class Checkpoint:
    """A whole checkpoint on disk, read piece by piece.

    Attributes:
        samples: Samples consumed when it was written.
        world_size: Number of ranks that wrote it.
        files: ``name``, ``bytes`` and ``sha256`` of each.
        format_version: Of its layout.
        state: The run state given to ``save``.
        shapes: Full shape of every parameter, by name.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            index = json.loads((path / "checkpoint.json").read_text())
            version = index["format_version"]
        except (OSError, ValueError, KeyError) as error:
            raise BrokenCheckpointError(
                f"{path} has no readable checkpoint.json: {error}; use another checkpoint"
            ) from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} was written by a newer Patchmill (format {version}, this one reads "
                f"{FORMAT_VERSION}); update Patchmill"
            )
        self.format_version: int = version
        self.world_size: int = index["world_size"]
        self.files: list[dict] = index["files"]
        self.samples: int = index["samples"]
        self.state: dict[str, Any] = index["state"]
        self.shapes: dict[str, tuple] = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self._where: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self._files = Mapped(lambda file: safe_open(file, framework="pt"))

    def verify(self, files: list[dict] | None = None) -> None:
        """Check sizes and checksums of all files, or of the given ones; raise BrokenCheckpointError."""
        for file in self.files if files is None else files:
            self.verify_sizes([file])
            path = self.path / file["name"]
            with open(path, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                    raise BrokenCheckpointError(
                        f"{path} does not have the checksum it was written with; use another checkpoint"
                    )

    def verify_sizes(self, files: list[dict] | None = None) -> None:
        """Check that all files, or the given ones, are there and as long as they were; raise BrokenCheckpointError."""
        for file in self.files if files is None else files:
            path = self.path / file["name"]
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise BrokenCheckpointError(f"{path} is missing or cut short; use another checkpoint")

    def counts(self) -> dict[tuple[str, str], int]:
        """Return of each (kind, parameter) how many values there are."""
        found: dict[tuple[str, str], int] = {}
        for file in self.files:
            opened = self._opened(file["name"])
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, rest = key.partition("/")
                where = kind, rest.rpartition("@")[0]
                found[where] = found.get(where, 0) + opened.get_slice(key).get_shape()[0]
        return found

    def read(self, kind: str, parameter: str, start: int, count: int) -> Tensor:
        """Return values [start, start + count) of a flattened parameter's kind, float32, whichever ranks wrote them.

        Raises:
            MissingPieceError: The checkpoint lacks some of them.
        """
        if not self._where:
            self._index()
        parts, at = [], start
        for piece_start, file in self._where.get((kind, parameter), []):
            piece = self._opened(file).get_slice(f"{kind}/{parameter}@{piece_start}")
            stop = piece_start + piece.get_shape()[0]
            if piece_start <= at < stop and at < start + count:
                until = min(stop, start + count)
                parts.append(self._files.counted(piece[at - piece_start : until - piece_start]))
                at = until
        if at < start + count:
            raise MissingPieceError(
                f"checkpoint {self.path} holds no {kind} of {parameter} at [{at}, {start + count}); "
                "it is of another model or optimizer: use the settings that wrote it"
            )
        return torch.cat(parts)

    def weights(self, ema: bool = False) -> Iterable[tuple[str, Tensor]]:
        """Yield every parameter whole, or its moving average, by name, one at a time."""
        for name, shape in self.shapes.items():
            numel = 1
            for size in shape:
                numel *= size
            yield name, self.read("ema" if ema else "weight", name, 0, numel).reshape(shape)

    def close(self) -> None:
        """Let go of the files; another read opens them again."""
        self._files.close()

    def _opened(self, name: str) -> Any:
        return self._files(self.path / name)

    def _index(self) -> None:
        for file in self.files:
            for key in self._opened(file["name"]).keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, _, rest = key.partition("/")
                parameter, _, start = rest.rpartition("@")
                self._where.setdefault((kind, parameter), []).append((int(start), file["name"]))
        for entries in self._where.values():
            entries.sort()


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that passes verification, or None; collective, and the ranks share the checking.

    A broken one is passed over with a warning, so that a damaged file costs some steps and not the run.
    """
    return first_whole(whole_checkpoints(folder))


def first_whole(candidates: list[Path]) -> Checkpoint | None:
    """Return the first of some checkpoints that passes verification, or None, as ``newest`` does."""
    for candidate in distributed.everyone(candidates)[0]:
        problem = None
        try:
            checkpoint = Checkpoint(candidate)
            checkpoint.verify(checkpoint.files[distributed.rank() :: distributed.world_size()])
        except BrokenCheckpointError as error:
            problem = error
        problems = [p for p in distributed.everyone(problem) if p is not None]
        if not problems:
            return checkpoint
        if distributed.rank() == 0:
            print(f"warning: {problems[0]} (falling back to the one before)", file=sys.stderr)
    return None
