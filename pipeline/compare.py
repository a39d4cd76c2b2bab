"""Two checkpoints, tensor by tensor, whatever engine, ZeRO stage and number of ranks wrote each."""

import math
from typing import Any

import torch

from pipeline.checkpoint import Checkpoint

AT_ONCE = 2**24
"""Values that are compared at once: 67 MB of each."""


def compare(first: Checkpoint, second: Checkpoint) -> list[dict[str, Any]]:
    """Compare weights, optimizer states and moving averages of two checkpoints.

    Returns:
        Of each tensor that is in either ``kind`` and ``parameter``; ``only_in`` (``"first"`` or ``"second"``) or None;
        of those in both ``same`` (to the bit) and ``largest`` (difference of two values; None where one of them is no
        number), and ``shapes`` where these differ, whose values are then not compared.

    Raises:
        BrokenCheckpointError: Files of one do not pass verification.
    """
    for each in (first, second):
        each.verify()
    rows, counts, others = [], first.counts(), second.counts()
    for key in sorted(counts.keys() | others.keys()):
        row: dict[str, Any] = {"kind": key[0], "parameter": key[1], "only_in": None}
        if key not in counts or key not in others:
            rows.append(row | {"only_in": "first" if key in counts else "second", "same": False, "largest": None})
            continue
        shapes = [list(each.shapes.get(key[1], (count[key],))) for each, count in ((first, counts), (second, others))]
        if shapes[0] != shapes[1]:
            rows.append(row | {"same": False, "largest": None, "shapes": shapes})
            continue
        same, largest = _values(first, second, *key, counts[key])
        rows.append(row | {"same": same, "largest": largest})
    return rows


def _values(first: Checkpoint, second: Checkpoint, kind: str, parameter: str, count: int) -> tuple[bool, float | None]:
    same = True
    largest: float | None = 0.0
    for start in range(0, count, AT_ONCE):
        where = kind, parameter, start, min(AT_ONCE, count - start)
        one, other = first.read(*where), second.read(*where)
        if torch.equal(one.view(torch.int32), other.view(torch.int32)):
            continue
        same = False
        difference = float((one.double() - other.double()).abs().max())
        largest = None if largest is None or difference != difference else max(largest, difference)
    return same, largest


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return of each kind how many ``tensors`` there are, how many ``differ``, the ``largest`` difference and where."""
    found: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of_kind = [row for row in rows if row["kind"] == kind]
        differing = [row for row in of_kind if not row["same"]]
        worst = max(differing, key=_distance, default={"largest": 0.0, "parameter": None})
        found[kind] = {
            "tensors": len(of_kind), "differ": len(differing), "largest": worst["largest"],
            "parameter": worst["parameter"],
        }  # fmt: skip
    return found


def _distance(row: dict[str, Any]) -> float:
    return math.inf if row["largest"] is None else row["largest"]
