"""The files and folders that a plan names: where they are, and a digest of each, by which a change of them is seen."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from launch.results import digest
from shards.manifest import EXCLUDE


@dataclass(frozen=True)
class Inputs:
    """What a plan's paths stand for.

    Attributes:
        folder: That relative paths count from.
        known: Digests by path. A job is given those of its submission: it looks neither again at a million images, nor
            for what may be gone since shards were made of it.
    """

    folder: Path
    known: dict[str, str] = field(default_factory=dict)

    def has(self, path: Path) -> bool:
        """Tell whether a path is there, or was."""
        return str(path) in self.known or os.path.exists(path)  # also of a name too long for any file

    def digest(self, path: Path) -> str:
        """Return a digest of a file's or a folder's names, sizes and times: cheap, and it changes when anything does.

        But for drop lists of a data set: they never change, settings name the one in use, and a run may write the next;
        and for what is hidden: locks and what others have in the works, which is no image or shard.
        """
        if str(path) not in self.known:
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            files = [file for file in files if file.parent != path / EXCLUDE and not _is_hidden(file, path)]
            status = ((file.relative_to(path.parent).as_posix(), file.stat()) for file in files)
            self.known[str(path)] = digest([[name, each.st_size, each.st_mtime_ns] for name, each in status])
        return self.known[str(path)]


def _is_hidden(file: Path, folder: Path) -> bool:
    """Tell whether a file is, or the first folder below this one that has it."""
    parts = file.relative_to(folder).parts
    return any(name.startswith(".") for name in (*parts[:1], *parts[-1:]))
