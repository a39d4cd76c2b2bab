"""Parquet files with image bytes in a column, as the Hugging Face hub has them: ``image{bytes,path}`` and ``label``."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.classes import name_classes, read_classes
from shards.errors import UserError
from shards.objects import Entry
from shards.sources import Item, Source, clean_key, columns, place
from shards.sources.columns import Batch, LabelCells
from shards.sources.unpack import harmless, look, unpack
from shards.store import Store, open_store

IMAGE = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content")
ROWS = 10_000  # of a batch without images
IMAGES = 64  # of a batch with images


class Parquet(Source):
    """The images inside Parquet files. Rows cannot be read one by one, so images are unpacked once, file by file.

    Rows without a label, where labels are single ones, are left out and counted: hubs write -1 into test sets.

    Args:
        url: A file, or a folder with all ``*.parquet`` at any depth; ``train-00000-of-00005.parquet`` or a folder
            ``train`` tells the part.
        unpacked: Where images are unpacked; None: they are listed only, with the size -1.
        image: Column of images: bytes, or a struct with ``bytes``.
        label: Column of labels: names or class indices, one or a list.
        key: Column of keys; by default they are made of file name and row.
        classes: File with the name of a class a line. Otherwise those that the file itself tells, or all labels.

    Raises:
        UserError: There are no such files, their columns cannot be told, or a row makes no sense.
    """

    kind = "parquet"

    def __init__(
        self, url: str, unpacked: Path | None, *, image: str = "", label: str = "", key: str = "", classes: str = ""
    ):
        self.url = url
        self._unpacked = unpacked
        self.others: dict[str, int] = {}
        single = url.lower().endswith(".parquet") and ("://" in url or Path(url).is_file())
        self.root, name = place(url) if single else (url, "")
        self._store = open_store(self.root)
        files = [look(self._store, name)] if single else self._store.walk()
        self._files = [file for file in files if file.path.lower().endswith(".parquet")]
        if not self._files:
            raise UserError(f"no Parquet files in {url}; check the path")
        if unreadable := [file.path for file in self._files if file.size < 0]:
            raise UserError(
                f"cannot read {self.root}/{unreadable[0]}: it is a link to nowhere or no plain file; mend or remove it"
            )
        self._parts = [""] if single else [_part(file.path) for file in self._files]
        if "" in self._parts and any(self._parts):
            named = next(n for n, part in enumerate(self._parts) if part)
            raise UserError(
                f"{url}: {self._files[self._parts.index('')].path} tells no part, {self._files[named].path} tells "
                f"{self._parts[named]}; give a folder where all or none do, or one file"
            )
        schema = read_schema(self._store, self._files[0].path)
        self._image = _image_column(schema, image, url)
        self._label = columns.choose(schema.names, label, columns.LABEL, "label")
        self._key = columns.choose(schema.names, key, columns.KEY, "key")
        if not self._label:
            raise UserError(
                f"{url} has no column of labels among {', '.join(schema.names)}; say which, as in label=NAME"
            )
        self._labels = [LabelCells(self._label, "", "", self._error(file)) for file in self._files]
        self.multi_label, found = False, set()
        for labels, file in zip(self._labels, self._files, strict=True):
            multi, names, _ = labels.survey(self._rows(file))
            self.multi_label = self.multi_label or multi
            found |= names  # file by file: the names of all at once would be one copy a file
        if classes:
            self.classes = read_classes(classes)
        else:
            self.classes = _class_names(schema, self._label) or name_classes(dict.fromkeys(found, url))
        self._number = columns.number_labels(found, self.classes, url)

    def items(self) -> Iterator[Item]:
        """Yield the images file by file, row by row; all are unpacked before the first.

        Raises:
            UserError: A row has no key.
        """
        others: Counter[str] = Counter()
        for file in self._files if self._unpacked else ():  # other processes may be at some of them
            self._unpack(file, wait=False)
        for file, part, labels in zip(self._files, self._parts, self._labels, strict=True):
            if self._unpacked:
                table = self._unpack(file)
                assert table is not None  # it was waited for
                sizes = table["size"].to_numpy()
                starts = np.cumsum(sizes) - sizes
            stem = clean_key(file.path)
            for row, batch, at in self._rows(file):
                found, _ = labels.read(row, batch, at)
                if not (found or self.multi_label):
                    others["images without label"] += 1
                    continue
                key = batch[self._key][at] if self._key else f"{stem}/{row - 1:06d}"
                if key is None or not str(key).strip():
                    raise self._error(file)(row, f"has no key in column {self._key}")
                numbers = tuple(self._number[label] for label in found)
                if len(set(numbers)) < len(numbers):
                    raise self._error(file)(row, f"has one class twice, {found}")
                yield Item(
                    clean_key(f"{key}."),
                    f"@/{harmless(file.path)}.bin",
                    int(starts[row - 1]) if self._unpacked else 0,
                    int(sizes[row - 1]) if self._unpacked else -1,
                    numbers,
                    (),
                    file.changed,
                    part,
                )
        self.others = dict(others)

    def _unpack(self, file: Entry, wait: bool = True) -> pa.Table | None:
        def write(out: BinaryIO) -> pa.Table:
            sizes = []
            for batch in self._batches(file, [self._image], IMAGES):
                for cell in batch.column(0).to_pylist():
                    data = (cell["bytes"] if isinstance(cell, dict) else cell) or b""  # none: rejected as empty
                    sizes.append(len(data))
                    out.write(data)
            return pa.table({"size": pa.array(sizes, pa.int64())})

        assert self._unpacked is not None
        return unpack(self._unpacked, harmless(file.path), file, write, wait)

    def _rows(self, file: Entry) -> Iterator[tuple[int, Batch, int]]:
        """Yield each row's number in its file, counted from 1, with its batch, without images, and its place there."""
        row = 0
        for batch in self._batches(file, [name for name in (self._label, self._key) if name], ROWS):
            values = batch.to_pydict()
            for at in range(len(batch)):
                row += 1
                yield row, values, at

    def _batches(self, file: Entry, wanted: list[str], rows: int) -> Iterator[pa.RecordBatch]:
        try:
            with self._store.stream(file.path) as stream:
                parquet = pq.ParquetFile(stream)
                if lacking := set(wanted) - set(parquet.schema_arrow.names):
                    raise UserError(
                        f"{self.root}/{file.path} has no column {min(lacking)}, as {self._files[0].path} has; give a "
                        "folder with files of one kind"
                    )
                yield from parquet.iter_batches(rows, columns=wanted, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.root}/{file.path} is damaged: {reason}; get or make it again") from error

    def _error(self, file: Entry) -> Callable[[int, str], UserError]:
        return lambda row, what: UserError(f"row {row} of {self.root}/{file.path} {what}; mend or remove it")


def read_schema(store: Store, path: str) -> pa.Schema:
    """Return the columns of a Parquet file."""
    with store.stream(path) as stream:
        try:
            return pq.read_schema(stream)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{store.url}/{path} is no Parquet file: {error}; get or make it again") from error


def image_columns(schema: pa.Schema) -> list[str]:
    """Return the columns that could hold image bytes."""
    return [field.name for field in schema if _holds_bytes(field.type)]


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(schema: pa.Schema, given: str, url: str) -> str:
    if given:
        return columns.choose(schema.names, given, (), "image")
    found = image_columns(schema)
    named = [name for name in found if name.lower() in IMAGE]
    if len(found) == 1 or len(named) == 1:
        return (named or found)[0]
    what = f"several columns of bytes, {', '.join(found)}" if found else "no column of image bytes"
    raise UserError(f"{url} has {what}; say which holds the images, as in image={(found or ['NAME'])[0]}")


def _class_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Return the names of the classes that the hub's ``datasets`` library notes in the file."""
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]
        feature = feature[0] if isinstance(feature, list) else feature.get("feature", feature)
        names = feature["names"]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None
    return [str(name) for name in names]


def _part(path: str) -> str:
    """Return the part that a file's name tells: that before ``-00000-of-00005``, or a folder such as ``train``."""
    folder, _, name = path.rpartition("/")
    found = re.fullmatch(r"([A-Za-z0-9_]+)-\d+-of-\d+.*", name)
    if found and found[1] != "all":  # which says that there are no parts
        return found[1]
    known = [part for part in (name.partition(".")[0], *folder.split("/")[::-1]) if part in _PARTS]
    return known[0] if known else ""


_PARTS = ("train", "test", "validation", "val", "dev")
