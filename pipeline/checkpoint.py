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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline import distributed
from pipeline.engines.fragments import MissingPieceError, Piece
from shards.atomic import commit_folder, partial_folder, write_text
from shards.errors import PatchmillError, UserError

FORMAT_VERSION = 1
AT_ONCE = 2**28
"""Bytes to read of mapped files before they are let go: until then they count as this process's memory."""


class BrokenCheckpointError(PatchmillError):
    """A checkpoint whose files are missing, cut short or altered."""


def save(
    folder: Path,
    samples: int,
    pieces: Iterable[Piece],
    shapes: dict[str, tuple],
    state: dict[str, Any],
    best: bool = False,
) -> Path:
    """Write the checkpoint of ``samples`` consumed; collective over all ranks.

    Args:
        folder: The run's ``checkpoints`` folder.
        samples: Samples consumed so far: where the run stands.
        pieces: This rank's pieces.
        shapes: Full shape of every parameter, by name.
        state: What else a resume needs, as plain JSON values; rank 0's counts.
        best: Whether the pointer ``best`` moves to this checkpoint too.

    Returns:
        The checkpoint's final path.
    """
    rank = distributed.rank()
    final = folder / f"samples-{samples:012d}"
    partial = folder / f".{final.name}.partial"
    entries: list[dict[str, Any]] = []

    def write_mine() -> None:
        entries.append(_write_rank_file(partial / f"rank-{rank:05d}.safetensors", pieces))

    def commit() -> None:
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

    _together(final, lambda: partial_folder(final), rank == 0)
    _together(final, write_mine, True)
    files = distributed.everyone(entries[0])
    _together(final, commit, rank == 0)
    return final


def _together(final: Path, action: Callable[[], Any], mine: bool) -> None:
    """Do one step of a save where it is this rank's to do, and wait for all; a failure on one rank raises on all."""
    error = None
    try:
        if mine:
            action()
    except (OSError, SafetensorError) as problem:
        error = PatchmillError(
            f"cannot write checkpoint {final}: {problem}; make room or mend the disk, then run again"
        )
    distributed.raise_together(error)


def _write_rank_file(path: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    tensors = {f"{kind}/{name}@{start}": tensor.cpu().contiguous() for kind, name, start, tensor in pieces}
    save_file(tensors, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints, ``latest`` and ``best``; rank 0 alone calls it."""
    pointed = {pointer(folder, name) for name in ("latest", "best")}
    for old in whole_checkpoints(folder)[keep:]:
        if old not in pointed:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = old.with_name(f".{old.name}.partial")
            os.replace(old, doomed)
            shutil.rmtree(doomed)


def clear_partial(folder: Path) -> None:
    """Remove what killed saves left behind; rank 0 alone calls it, before the first step."""
    for partial in folder.glob(".samples-*.partial"):
        shutil.rmtree(partial)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run that were committed, newest first."""
    return sorted((path.parent for path in folder.glob("samples-*/checkpoint.json")), reverse=True)


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
        self.files: list[dict] = index["files"]
        self.samples: int = index["samples"]
        self.state: dict[str, Any] = index["state"]
        self.shapes: dict[str, tuple] = {name: tuple(shape) for name, shape in index["shapes"].items()}
        self._where: dict[tuple[str, str], list[tuple[int, str]]] = {}
        self.close()

    def verify(self, files: list[dict] | None = None) -> None:
        """Check sizes and checksums of all files, or of the given ones; raise BrokenCheckpointError."""
        for file in self.files if files is None else files:
            path = self.path / file["name"]
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise BrokenCheckpointError(f"{path} is missing or cut short; use another checkpoint")
            with open(path, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != file["sha256"]:
                    raise BrokenCheckpointError(
                        f"{path} does not have the checksum it was written with; use another checkpoint"
                    )

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
                parts.append(piece[at - piece_start : until - piece_start])
                self._mapped += parts[-1].nbytes
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
        self._open, self._mapped = {}, 0

    def _opened(self, name: str) -> Any:
        if self._mapped > AT_ONCE:
            self.close()
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]

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
    candidates = distributed.everyone([str(path) for path in whole_checkpoints(folder)])[0]
    for candidate in map(Path, candidates):
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
