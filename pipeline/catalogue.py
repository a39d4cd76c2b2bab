"""What can be told of checkpoints: where they are, what they are of, whether they are whole."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from pipeline.checkpoint import Checkpoint, pointer
from pipeline.checkpointindex import BrokenCheckpointError
from shards.errors import PatchmillError, UserError

POINTERS = ("latest", "best")


def find(path: Path) -> list[Path]:
    """Return the checkpoints of a training stage's folder, broken ones too, oldest first; or the one at ``path``.

    Raises:
        UserError: There is none.
    """
    if (path / "checkpoint.json").is_file() or path.name.startswith("samples-"):
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {path}; give a checkpoint, or the folder of a training stage")
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = sorted(each for each in folder.glob("samples-*") if each.is_dir())
    if not found:
        raise UserError(f"there is no checkpoint in {path}; give a checkpoint, or the folder of a training stage")
    return found


def newest(path: Path) -> Path:
    """Return the checkpoint at ``path``, or that which ``latest`` of a stage's folder names, or else its newest."""
    found = find(path)
    latest = pointer(found[-1].parent, "latest")
    return latest if latest in found else found[-1]


def facts(path: Path) -> dict[str, Any]:
    """Return what a checkpoint is of, without reading its values.

    Returns:
        ``name``, ``path``, ``pointers`` to it, and ``problem`` (None: all files are there and as long as they should
        be); of one whose index is readable ``samples``, ``step``, ``global_batch``, ``world_size``,
        ``engine``, ``zero_stage``, ``precision``, ``bytes``, ``parameters``, ``kinds`` (bytes of each), ``model`` (its
        name), ``digest`` (of names, sizes and checksums of all files), ``data`` (digest of the data set, of several of
        each), ``versions``, ``commit``, ``val``, ``best``, ``probe``, ``format_version``.
    """
    told: dict[str, Any] = {
        "name": path.name, "path": str(path),
        "pointers": [name for name in POINTERS if pointer(path.parent, name) == path],
    }  # fmt: skip
    try:
        found = Checkpoint(path)
    except PatchmillError as error:  # broken, or of a newer Patchmill
        return told | {"problem": str(error)}
    state = found.state
    settings = _table(state, "settings")
    engine, loader = _table(settings, "engine"), _table(state, "loader")
    problem, counts = None, {}
    try:
        found.verify_sizes()
        counts = found.counts()
    except BrokenCheckpointError as error:
        problem = str(error)
    told |= {
        "problem": problem, "samples": found.samples, "step": state.get("steps"),
        "global_batch": settings.get("global_batch"), "world_size": found.world_size, "engine": engine.get("kind"),
        "zero_stage": engine.get("zero_stage"), "precision": engine.get("precision"),
        "bytes": sum(file["bytes"] for file in found.files), "parameters": sum(map(math.prod, found.shapes.values())),
        "model": _table(state, "model").get("name"), "digest": digest(found.files), "data": loader.get("data"),
        "versions": state.get("versions"), "commit": state.get("commit"), "val": state.get("val"),
        "best": state.get("best"), "probe": state.get("probe"), "format_version": found.format_version,
    }  # fmt: skip
    if problem is None:
        kinds: dict[str, int] = {}
        for (kind, _), count in counts.items():
            kinds[kind] = kinds.get(kind, 0) + 4 * count
        told["kinds"] = kinds
    found.close()
    return told


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a table inside a table; an empty one where something else stands."""
    found = table.get(key)
    return found if isinstance(found, dict) else {}


def digest(files: list[dict[str, Any]]) -> str:
    """Return the SHA-256 of names, sizes and checksums of a checkpoint's files: of all that they hold."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
