"""Which classes there are: those that a file names, or all that the labels name."""

from collections.abc import Mapping

from shards.errors import UserError
from shards.labels import spelled
from shards.sources import place
from shards.store import open_store

MOST_CLASSES = 1_000_000  # a larger number is no class index, but some other number, such as that of a row


def read_classes(url: str) -> list[str]:
    """Read the names of all classes, in order, from a text file at a path or URL, one a line. Two may be the same.

    Raises:
        UserError: There is no such file, or a line is empty.
    """
    folder, name = place(url)
    try:
        names = open_store(folder).read(name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read classes {url}: {error}; give a text file in UTF-8, one name a line") from error
    names = [line.strip() for line in names]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise UserError(f"classes {url}: line {names.index('') + 1 if names else 1} is empty; write one name a line")
    return names


def name_classes(found: Mapping[int | str, str]) -> list[str]:
    """Return the names of all classes, by all labels found: names sorted, or the numbers up to the largest.

    Args:
        found: Where each label was found, for errors.

    Raises:
        UserError: Labels are names and numbers at once, or numbers too large for a class index.
    """
    numbers = {label: spelled(label) if isinstance(label, str) else label for label in found}
    if None in numbers.values():
        texts = sorted(label for label in found if isinstance(label, str))
        if len(texts) < len(found):
            number = min(label for label in found if not isinstance(label, str))
            raise UserError(
                f"labels are names, such as {texts[0]} in {found[texts[0]]}, and numbers, such as {number} in "
                f"{found[number]}; give --classes, a file of all names"
            )
        return texts
    top: int | str = max(numbers, key=lambda label: numbers[label] or 0, default=-1)
    classes = (numbers[top] or 0) + 1 if numbers else 0
    if classes > MOST_CLASSES:
        raise UserError(
            f"label {top} in {found[top]} would make {classes:,} classes; if it is no class index, say with --label "
            "where labels stand, or give --classes, a file of all names"
        )
    return [str(number) for number in range(classes)]
