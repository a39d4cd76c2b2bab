"""Indices of checkpoints that say something else than what was saved, with a checksum that is right."""

import json
from pathlib import Path
from typing import Any

from pipeline.checkpointindex import CHECKSUM, index_text


def with_changes(index: Path, changes: dict[str, Any]) -> str:
    """Return the text of an index after changes of what it says."""
    told = json.loads(index.read_text())
    del told[CHECKSUM]
    return index_text(told | changes)
