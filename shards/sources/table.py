"""A table of paths or URLs of images: CSV, JSON lines or Parquet; with one label, many labels, or weights.

Read in batches and never whole: a table may have 100 million rows. It is gone through twice, for the labels first.
"""

import csv
import io
import json
import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from shards.classes import name_classes, read_classes
from shards.errors import UserError
from shards.sources import Item, Source, clean_key, columns, place
from shards.sources.columns import Batch, LabelCells
from shards.store import open_store

IMAGE = (
    "image", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "url", "image_url", "uri",
)  # fmt: skip
WEIGHT = ("weight", "weights", "label_weights")
ROWS = 10_000  # of a batch


class Table(Source):
    """The images that a table names.

    Args:
        url: Path or URL of the table; relative paths in it count from its folder.
        unpacked: Not used: images are read where they are.
        image: Column of paths or URLs.
        label: Column of labels: names or class indices, one, a list, or a dict of weights by label.
        weight: Column of weights: a list beside the labels, or a dict of weights by label.
        key: Column of keys; by default they are made of paths.
        separator: Between labels, or weights, in one CSV cell.
        classes: File with the name of a class a line. Otherwise the classes are all names found, sorted, or numbers.

    Raises:
        UserError: The table cannot be read, its columns cannot be told, or a row makes no sense.
    """

    kind = "table"

    def __init__(
        self,
        url: str,
        unpacked: Path,
        *,
        image: str = "",
        label: str = "",
        weight: str = "",
        key: str = "",
        separator: str = "",
        classes: str = "",
    ):
        self.url = url
        self.root, self._name = place(url)
        self.others: dict[str, int] = {}
        self._store = open_store(self.root)
        form = Path(self._name).suffix.lower()
        if form not in _FORMS:
            raise UserError(f"table {url}: cannot read {form or 'no extension'}; the forms are {', '.join(_FORMS)}")
        read_names, self._read = _FORMS[form]
        with self._store.stream(self._name) as stream, _in_one_line(self.url):
            names = read_names(stream)
        if not names:
            raise UserError(f"table {url} is empty; its first row must name the columns")
        self._image = columns.choose(names, image, IMAGE, "image")
        self._weight = columns.choose(names, weight, WEIGHT, "weight")
        self._label = columns.choose(names, label, columns.LABEL, "label")
        self._key = columns.choose(names, key, columns.KEY, "key")
        if not self._image:
            raise UserError(
                f"{url} has no column of images among {', '.join(names)}; say which, as in image={names[0]}"
            )
        if not (self._label or self._weight):
            raise UserError(
                f"{url} has no column of labels among {', '.join(names)}; say which, as in label={names[0]}"
            )
        self._labels = LabelCells(self._label, self._weight, separator, self._error)
        self.multi_label, found, bare = self._labels.survey(self._rows())
        if bare and not self.multi_label:
            raise self._error(bare[0], f"has no label in column {self._label}")
        self.classes = read_classes(classes) if classes else name_classes(dict.fromkeys(found, url))
        self._number = columns.number_labels(found, self.classes, url)

    def items(self) -> Iterator[Item]:
        """Yield the images in the order of the table. What is not there gets the size -1: the reader will tell.

        Raises:
            UserError: A row has no image, or no key.
        """
        local = self._store.local
        for row, batch, at in self._rows():
            image = batch[self._image][at]
            if not isinstance(image, str) or not image.strip():
                raise self._error(row, f"has no image in column {self._image}")
            key = batch[self._key][at] if self._key else None
            if self._key and (key is None or not str(key).strip()):
                raise self._error(row, f"has no key in column {self._key}")
            image = image.strip()
            labels, weights = self._labels.read(row, batch, at)
            numbers = tuple(self._number[label] for label in labels)
            if len(set(numbers)) < len(numbers):
                raise self._error(row, f"has one class twice, {labels}")
            web = "://" in image
            size, changed = _look(os.path.join(self.root, image)) if local and not web else (-1, 0)
            yield Item(
                clean_key(f"{key}.") if self._key else _key(image, web),
                image if web else self._file(image),
                0,
                size,
                numbers,
                tuple(weights),
                changed,
            )

    def _rows(self) -> Iterator[tuple[int, Batch, int]]:
        """Yield each row's number, counted from 1, with its batch and its place there."""
        wanted = [name for name in (self._image, self._label, self._weight, self._key) if name]
        row = 0
        with self._store.stream(self._name) as stream, _in_one_line(self.url):
            for batch in self._read(stream, wanted):
                for at in range(len(batch[self._image])):
                    row += 1
                    yield row, batch, at

    def _file(self, path: str) -> str:
        """Return a relative path as items have it. In a bucket or on the web, ``..`` must go."""
        if self._store.local or path.startswith("/"):
            return f"./{path}" if path.startswith("@/") else path
        path = posixpath.normpath(path)
        if not path.startswith("../"):
            return f"./{path}" if path.startswith("@/") else path
        scheme, _, rest = self.root.partition("://")
        host, _, folder = rest.partition("/")
        path = quote(path) if scheme.startswith("http") else path
        return f"{scheme}://{host}{posixpath.normpath(f'/{folder}/{path}')}"

    def _error(self, row: int, what: str) -> UserError:
        return UserError(f"row {row} of {self.url} {what}; mend the table")


@contextmanager
def _in_one_line(url: str) -> Iterator[None]:
    """Turn what parsers raise into an error for the user."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition("\n")[0]
        raise UserError(f"cannot read table {url}: {reason}; mend the table") from error


def _look(path: str) -> tuple[int, int]:
    """Return the size of a file and when it was changed; -1 and 0 if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1, 0
    return (status.st_size, status.st_ctime_ns) if stat.S_ISREG(status.st_mode) else (-1, 0)


def _key(image: str, web: bool) -> str:
    if not web:
        return clean_key(image)
    try:
        parts = urlsplit(image)
    except ValueError:  # no URL: the reader will tell
        return clean_key(image.partition("://")[2])
    query = f"_{parts.query}".translate(str.maketrans("./\\", "___")) if parts.query else ""
    return clean_key(f"{parts.netloc.replace('@', '_')}/{unquote(parts.path)}") + query


def _csv_names(stream: BinaryIO) -> list[str]:
    names = next(csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")), [])
    if len(set(names)) < len(names):
        raise csv.Error(f"two columns have one name: {', '.join(names)}")
    return names


def _csv_batches(stream: BinaryIO, wanted: list[str]) -> Iterator[Batch]:
    """Read cells as text: guessing types from the first rows goes wrong further down."""
    with pa.csv.open_csv(
        stream,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, strings_can_be_null=False
        ),
    ) as reader:
        for batch in reader:
            yield batch.to_pydict()


def _json_names(stream: BinaryIO) -> list[str]:
    return list(dict.fromkeys(name for _, row in islice(_json_rows(stream), 100) for name in row))


def _json_rows(stream: BinaryIO) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(stream, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # the first also of numbers with thousands of digits
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
                raise json.JSONDecodeError(f"line {number}: {why}", "", 0) from error
            if not isinstance(row, dict):
                raise json.JSONDecodeError(f"line {number}: an object is wanted, with columns", "", 0)
            yield number, row


def _json_batches(stream: BinaryIO, wanted: list[str]) -> Iterator[Batch]:
    """Read line by line: pyarrow's reader makes a column of each label of a dict, and fails at new ones."""
    rows = _json_rows(stream)
    while batch := [row for _, row in islice(rows, ROWS)]:
        yield {name: [row.get(name) for row in batch] for name in wanted}


def _parquet_names(stream: BinaryIO) -> list[str]:
    return pq.read_schema(stream).names


def _parquet_batches(stream: BinaryIO, wanted: list[str]) -> Iterator[Batch]:
    for batch in pq.ParquetFile(stream).iter_batches(ROWS, columns=wanted, use_threads=False):
        yield batch.to_pydict()


_FORMS: dict[str, tuple[Callable, Callable]] = {
    ".csv": (_csv_names, _csv_batches),
    ".jsonl": (_json_names, _json_batches),
    ".parquet": (_parquet_names, _parquet_batches),
}
