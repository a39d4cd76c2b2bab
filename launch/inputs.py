"""The files and folders that a plan names: where they are, and a digest of each, by which a change of them is seen."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from xxhash import xxh3_128

from launch.results import digest
from shards.errors import UserError
from shards.manifest import EXCLUDE

READ = 4 << 30
"""Bytes of the largest file that is read for its digest: weights, not a whole data set in one file."""


@dataclass(frozen=True)
class Inputs:
    """What a plan's paths stand for.

    Attributes:
        folder: That relative paths count from.
        known: Digests by path. A job is given those of its submission: it looks neither again at a million images, nor
            for what may be gone since shards were made of it.
        recipes: Copies of recipes beside the plan, by the name that stages have for each: what a job goes by.
    """

    folder: Path
    known: dict[str, str] = field(default_factory=dict)
    recipes: dict[str, Path] = field(default_factory=dict)

    def recipe(self, name: str) -> str | Path:
        """Return where a stage's recipe is, if it is one beside the plan; its name, if it is one that ships."""
        return self.recipes.get(name, self.folder / name) if is_beside(name) else name

    def has(self, path: Path) -> bool:
        """Tell whether a path is there, or was."""
        return str(path) in self.known or os.path.exists(path)  # also of a name too long for any file

    def digest(self, path: Path, one_of_many: bool = False) -> str:
        """Return a digest of what a file holds; of a folder, of its files' names, sizes and times.

        Those cost no reading, and change when anything does; so they do for a file of more than ``READ`` bytes, and for
        ``one_of_many``. Drop lists of a data set do not count: they never change, settings name the one in use, and a
        run may write the next; nor what is hidden: locks and what others have in the works, which is no image or shard.

        Raises:
            UserError: The file cannot be read.
        """
        if str(path) not in self.known:
            if path.is_file() and path.stat().st_size <= READ and not one_of_many:
                self.known[str(path)] = _content(path)
                return self.known[str(path)]
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
            files = [file for file in files if file.parent != path / EXCLUDE and not _is_hidden(file, path)]
            status = ((file.relative_to(path.parent).as_posix(), file.stat()) for file in files)
            self.known[str(path)] = digest([[name, each.st_size, each.st_mtime_ns] for name, each in status])
        return self.known[str(path)]


def _content(path: Path) -> str:
    """Return the XXH3-128 of a file, in hex: as fast as disks read."""
    hashed = xxh3_128()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                hashed.update(block)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; mend that, or name another") from None
    return hashed.hexdigest()


def is_beside(recipe: str) -> bool:
    """Tell whether a stage's recipe is a file beside the plan, or of the name of one that ships."""
    return recipe.endswith(".toml")


def _is_hidden(file: Path, folder: Path) -> bool:
    """Tell whether a file is, or the first folder below this one that has it."""
    parts = file.relative_to(folder).parts
    return any(name.startswith(".") for name in (*parts[:1], *parts[-1:]))
