"""The code as it was when a run was submitted, in the run's folder: its jobs run that, whatever is edited meanwhile."""

import shutil
from pathlib import Path

from pipeline import provenance
from shards.atomic import commit_folder, fsync_folder, partial_folder, write_text

PACKAGES = ("launch", "pipeline", "shards")


def take_snapshot(folder: Path) -> None:
    """Copy the packages that run into ``folder``, with the commit they are of; what was there before is replaced."""
    source, partial = Path(__file__).parents[1], partial_folder(folder)
    for package in PACKAGES:
        shutil.copytree(source / package, partial / package, ignore=shutil.ignore_patterns("__pycache__"))
        fsync_folder(partial / package)
    write_text(partial / provenance.SNAPSHOT, f"{provenance.commit() or ''}\n{provenance.diff()}")
    commit_folder(partial, folder)
