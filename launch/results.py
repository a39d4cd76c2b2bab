"""What a stage of a plan leaves behind when it has finished."""

import hashlib
import json
from pathlib import Path
from typing import Any

from shards.errors import UserError


def result_of(folder: Path, digest: str | None = None) -> dict[str, Any] | None:
    """Return what ``result.json`` of a stage's folder says, if the stage finished, with this digest if one is given."""
    found = read_json(folder / "result.json")
    return found if found and digest in (None, found.get("digest")) else None


def read_json(path: Path, remedy: str = "remove it, and what it told is made anew") -> dict[str, Any]:
    """Return a table, empty where there is no file.

    Raises:
        UserError: The file is damaged; it tells the remedy.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, and no table")
        return found
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from None


def digest(value: Any) -> str:
    """Return the SHA-256 of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
