"""What tables say about images: which column is which, and which classes the labels are."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from shards.errors import UserError
from shards.labels import ClassNames, LabelError, is_weight, spelled

LABEL = ("label", "labels", "class", "classes", "cls", "target", "targets", "fine_label")
KEY = ("key", "__key__")

Batch = dict[str, list]  # values by column


@dataclass(frozen=True)
class LabelCells:
    """Reads labels and weights out of the cells of a table.

    Attributes:
        label: Column of labels: names or class indices, one, a list, or a dict of weights by label; or empty.
        weight: Column of weights: a list beside the labels, or a dict of weights by label; or empty.
        separator: Between labels, or weights, in one cell of text; or empty.
        error: Makes the error for a row, by its number and what is wrong.
    """

    label: str
    weight: str
    separator: str
    error: Callable[[int, str], UserError]

    def survey(self, rows: Iterable[tuple[int, Batch, int]]) -> tuple[bool, set[int | str], list[int]]:
        """Return whether rows have several or weighted labels, all labels that there are, and rows without any.

        Args:
            rows: For each its number, its batch, and its place there. Of those without labels the first is enough.
        """
        multi = bool(self.weight or self.separator)
        found: set[int | str] = set()
        bare: list[int] = []
        for row, batch, at in rows:
            labels, _ = self.read(row, batch, at)
            found.update(labels)
            multi = multi or isinstance(batch[self.label][at], (list, dict))
            if not (labels or bare):
                bare.append(row)
        return multi, found, bare

    def read(self, row: int, batch: Batch, at: int) -> tuple[list[int | str], list[float]]:
        """Return the labels of a row and their weights; no weights: all are 1.

        A missing cell, -1 and an empty text mean that there is no label.

        Raises:
            UserError: The cells make no sense.
        """
        cell: Any = batch[self.label][at] if self.label else None
        plain = not (self.weight or self.separator)
        if plain and (
            (type(cell) is str and cell == cell.strip() and cell[:1] not in ("", "-"))
            or (type(cell) is int and cell >= 0)
        ):
            return [cell], []
        weights: Any = self._parse(row, batch[self.weight][at]) if self.weight else None
        if isinstance(weights, dict):
            cell = weights
        cell = _as_dict(cell)
        if isinstance(cell, dict):
            cell = {label: weight for label, weight in cell.items() if weight is not None}  # a struct has all fields
            cell, weights = list(cell), list(cell.values())
        elif self.separator and isinstance(cell, str):
            cell = [part.strip() for part in cell.split(self.separator) if part.strip()]
        several = isinstance(cell, list)
        labels: list[Any] = [self._one(row, label) for label in (cell if several else [cell])]
        if labels == [None] and not several:
            labels = []
        if None in labels or len(set(labels)) < len(labels):
            raise self.error(row, f"has the labels {cell}, one of them empty or twice")
        return labels, self._weights(row, labels, weights)

    def _one(self, row: int, label: object) -> int | str | None:
        if isinstance(label, float) and label.is_integer():  # what integers with gaps become in other programs
            label = int(label)
        if isinstance(label, str):
            label = label.strip()
            if label.startswith("-") and (number := spelled(label)) is not None:
                label = number
        if label is None or label == "" or label == -1 or label != label:
            return None
        if isinstance(label, bool) or not isinstance(label, (int, str)) or (isinstance(label, int) and label < 0):
            raise self.error(row, f"has the label {str(label)[:50]!r}, which is neither a class index nor a name")
        return label

    def _parse(self, row: int, cell: object) -> object:
        """Return weights as numbers; in a text they stand as JSON, or with the separator between them."""
        if not isinstance(cell, str):
            return _as_dict(cell)
        try:
            if cell.lstrip().startswith(("{", "[")):
                return json.loads(cell)
            parts = cell.split(self.separator) if self.separator else [cell]
            return [float(part) for part in parts if part.strip()]
        except (ValueError, RecursionError) as error:
            raise self.error(row, f"has the weights {cell[:50]!r}, which are no numbers") from error

    def _weights(self, row: int, labels: list, weights: Any) -> list[float]:
        if weights is None or weights == []:
            return []
        weights = weights if isinstance(weights, list) else [weights]
        if len(weights) != len(labels):
            raise self.error(row, f"has {len(weights)} weights for {len(labels)} labels")
        for weight in weights:
            if not is_weight(weight):
                what = f"has the weight {str(weight)[:50]}"
                raise self.error(row, f"{what}; a weight is a number from 0 on that a float32 can hold")
        return [float(weight) for weight in weights]


def choose(names: Sequence[str], given: str, usual: Sequence[str], what: str) -> str:
    """Return the name of a column: the given one, or the only one with a usual name; empty if there is none.

    Args:
        names: Of all columns.
        given: By the user; may be empty.
        usual: In lower case.
        what: The option that gives the name, for errors.

    Raises:
        UserError: There is no such column, or several have usual names.
    """
    if given:
        if given not in names:
            raise UserError(f"{what}={given}: there is no such column; the columns are {', '.join(names)}")
        return given
    found = [name for name in names if name.lower() in usual]
    if len(found) > 1:
        raise UserError(f"columns {' and '.join(found)} could both be the {what}; say which, as in {what}={found[0]}")
    return found[0] if found else ""


def number_labels(labels: Iterable[int | str], classes: list[str], source: str) -> dict[int | str, int]:
    """Return the class index of each label.

    Raises:
        UserError: A label is no class.
    """
    names = ClassNames(classes)
    try:
        return {label: names.index(label) for label in labels}
    except LabelError as error:
        raise UserError(f"labels of {source}: {error}; mend the label or the list of classes") from error


def _as_dict(cell: object) -> object:
    """Return a map of Parquet, which comes as a list of pairs, as a dict, and anything else as it is."""
    return dict(cell) if isinstance(cell, list) and cell and isinstance(cell[0], tuple) else cell
