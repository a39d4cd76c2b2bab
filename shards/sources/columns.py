"""What tables say about images: which column is which, and which classes the labels are."""

from collections.abc import Iterable, Sequence

from shards.errors import UserError
from shards.labels import ClassNames, LabelError, as_index
from shards.sources import place
from shards.store import open_store

LABEL = ("label", "labels", "class", "classes", "cls", "target", "targets", "fine_label")
KEY = ("key", "__key__")
MOST_CLASSES = 1_000_000  # a larger number is some other number, such as that of a row


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


def read_classes(url: str) -> list[str]:
    """Read the names of all classes from a text file, one a line.

    Raises:
        UserError: There is no such file, a line is empty, or a name comes twice.
    """
    folder, name = place(url)
    try:
        names = open_store(folder).read(name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"classes {url}: {error}; give a text file in UTF-8, one name a line") from error
    names = [line.strip() for line in names]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UserError(f"classes {url}: line {names.index('') + 1 if names else 1} is empty; write one name a line")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"classes {url}: {twice} comes twice; give each class a name of its own")
    return names


def name_classes(labels: Iterable[int | str], source: str) -> list[str]:
    """Return the names of all classes, by all labels found: names sorted, or the numbers up to the largest.

    Raises:
        UserError: Labels are names and numbers at once, or no class indices.
    """
    labels = set(labels)
    texts = {label for label in labels if isinstance(label, str)}
    if any(_index(label, source) is None for label in texts):
        if len(texts) < len(labels):
            number = min(label for label in labels if not isinstance(label, str))
            raise UserError(
                f"labels of {source} are names, such as {min(texts)}, and numbers, such as {number}; give classes, a "
                "file of all names"
            )
        return sorted(texts)
    top = max((_index(label, source) for label in labels), default=-1)
    if top >= MOST_CLASSES:
        raise UserError(
            f"label {top} of {source} would make {top + 1:,} classes; if it is no class index choose another label "
            "column, or give classes, a file of all names"
        )
    return [str(number) for number in range(top + 1)]


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


def _index(label: int | str, source: str) -> int | None:
    try:
        return as_index(label)
    except LabelError as error:
        raise UserError(f"labels of {source}: {error}; choose another label column") from error
