"""The manifest of a data set: what its files are called, what they hold, and how they are read and written.

manifest/dataset.json            what the whole is; written last, so it marks a finished data set
manifest/shards.parquet          a row a shard
manifest/samples/000000.parquet  a row a sample; its metadata is the receipt of the shard
manifest/exclude/VERSION.parquet a row a dropped sample
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import PatchmillError, UserError
from shards.objects import MissingError
from shards.store import Store

SCHEMA_VERSION = 3
DATASET = "manifest/dataset.json"
SHARDS = "manifest/shards.parquet"
EXCLUDE = "manifest/exclude"

SHARDS_SCHEMA = pa.schema(
    [("path", pa.string()), ("samples", pa.int64()), ("bytes", pa.int64()), ("sha256", pa.string())]
)
SAMPLES_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),  # of the image's first byte in the tar
        ("size", pa.int64()),  # of the image, in bytes
        ("format", pa.string()),  # jpg, png or webp: the true one, and the member's extension
        ("labels", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),  # of the labels; null: all are 1
        ("width", pa.int32()),  # as stored
        ("height", pa.int32()),
        ("orientation", pa.int8()),  # of the EXIF data in the source: kept bytes still want it, re-encoded ones had it
        ("member", pa.uint32()),  # CRC-32 of the tar header before the image: tells a tar that was made anew
        ("xxh128", pa.binary(16)),  # of the image; the receipt has the sha256 of the whole tar
    ]
)
# Hashes fit no dictionary; offsets, sizes, labels and keys are near their neighbours: a sixth less than parquet's way.
SAMPLES_DICTIONARY = ["format", "width", "height", "orientation", "weights.list.element"]
SAMPLES_ENCODING = {
    "key": "DELTA_BYTE_ARRAY",
    "offset": "DELTA_BINARY_PACKED",
    "size": "DELTA_BINARY_PACKED",
    "labels.list.element": "DELTA_BINARY_PACKED",
    "member": "PLAIN",
    "xxh128": "PLAIN",
}
EXCLUDE_SCHEMA = pa.schema([("shard", pa.int32()), ("index", pa.int32()), ("reason", pa.string())])
_FIELDS = {field.name: field for schema in (SHARDS_SCHEMA, SAMPLES_SCHEMA, EXCLUDE_SCHEMA) for field in schema}
_MAY_LACK = ("labels", "weights")


def shard_path(shard: int) -> str:
    """Return the name of a shard's tar inside its data set."""
    return f"shards/{shard:06d}.tar"


def samples_path(shard: int) -> str:
    """Return the name of a shard's sample table inside its data set."""
    return f"manifest/samples/{shard:06d}.parquet"


def exclude_path(version: str) -> str:
    """Return the name of a drop list inside its data set."""
    return f"{EXCLUDE}/{version}.parquet"


@dataclass
class Info:
    """The content of ``dataset.json``."""

    classes: list[str]
    samples: int
    bytes: int  # of all tars
    image_bytes: int  # of the images in them
    shards: int
    digest: str
    build: dict  # the settings that made it
    tars: str | None = None  # the folder or URL of tars that lie elsewhere (an index of somebody else's)
    schema_version: int = SCHEMA_VERSION


@dataclass
class Receipt:
    """What is known of a shard once it is written; kept in the metadata of its sample table."""

    sha256: str  # of the tar
    bytes: int  # of the tar
    samples: int
    image_bytes: int  # of the images in the tar
    plan: str  # digest of what was asked of the build: which files, under which keys and labels
    rejected: list[tuple[str, str]] = field(default_factory=list)  # (file, reason)
    notes: dict = field(default_factory=dict)  # what else an index found; see shards/tarindex.py


def digest(classes: list[str], shard_sha256: Iterable[str], build: dict) -> str:
    """Return the hex digest of a data set: class names, all shards in order, and how an index reads labels in them."""
    read = [build["label"], build["image"]] if build.get("source") == "index" else []
    return hashlib.sha256(json.dumps([classes, list(shard_sha256), *read]).encode()).hexdigest()


def digest_with_exclude(base: str, shard: np.ndarray, index: np.ndarray) -> str:
    """Return the hex digest of a data set less its dropped samples (sorted pairs); reasons do not count."""
    pairs = np.stack([shard, index]).astype("<i4")
    return hashlib.sha256(base.encode() + pairs.tobytes()).hexdigest()


def write_table(store: Store, path: str, table: pa.Table, **encoding: Any) -> None:
    """Write a parquet file that appears whole or not at all; ``encoding`` is ``pyarrow.parquet.write_table``'s."""
    with store.new_file(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True, **encoding)


def table_bytes(table: pa.Table) -> bytes:
    """Return the content of a parquet file."""
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file.getvalue()


def read_table(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Read the content of a parquet file, or those of some columns that it has, on the calling thread."""
    # Not a file of Python's: Arrow reads that on a thread of its own, which lets go of the bytes when it likes, and if
    # the interpreter is taken apart by then, the process aborts.
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)  # where there are checksums
    return file.read(columns=columns, use_threads=False)


REMEDY = "copy or build the data set again"
TRIES = 10  # of a table that comes damaged, and otherwise each time


def open_table(store: Store, path: str, columns: list[str], remedy: str = REMEDY) -> pa.Table:
    """Read columns of a parquet file, in the order of the file; again if a network damaged it: it comes otherwise then.

    Raises:
        MissingError: There is no such file.
        UserError: It is damaged, or lacks one of the columns, or one has other values than it should.
    """
    data = store.read(path)
    for _ in range(TRIES):
        try:
            return _table(store, path, data, columns, remedy)
        except UserError:
            again = store.read(path)
            if again == data:
                raise
            data = again
    return _table(store, path, data, columns, remedy)


def open_exclude(store: Store, version: str | None) -> pa.Table:
    """Read a drop list, columns of ``EXCLUDE_SCHEMA``; without rows for None.

    Raises:
        UserError: There is no such drop list, or it is damaged.
    """
    if version is None:
        return EXCLUDE_SCHEMA.empty_table()
    try:
        return open_table(store, exclude_path(version), EXCLUDE_SCHEMA.names)
    except MissingError as error:
        raise UserError(f"{store.url} has no drop list {version!r}; there is no {exclude_path(version)}") from error


def _table(store: Store, path: str, data: bytes, columns: list[str], remedy: str) -> pa.Table:
    with _damage_told(store, path, remedy):
        table = read_table(data, columns)
        if missing := set(columns) - set(table.column_names):
            raise ValueError(f"no column {min(missing)}")
        for name in columns:
            _check_column(name, table[name])
        return table


def _check_column(name: str, column: pa.ChunkedArray) -> None:
    if name in _FIELDS and column.type != _FIELDS[name].type:
        raise ValueError(f"column {name} is of type {column.type}, not {_FIELDS[name].type}")
    lacking = pc.list_flatten(column) if name in _MAY_LACK else column
    if lacking.null_count and name in _FIELDS:
        raise ValueError(f"column {name} lacks {lacking.null_count} values")


@contextmanager
def _damage_told(store: Store, path: str, remedy: str = REMEDY) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{store.url}/{path} is damaged ({reason}); {remedy}") from error


def write_samples(store: Store, path: str, rows: dict[str, list], receipt: Receipt) -> None:
    """Write a shard's sample table (columns as in ``SAMPLES_SCHEMA``) with its receipt."""
    schema = SAMPLES_SCHEMA.with_metadata({"receipt": json.dumps(asdict(receipt))})
    table = pa.table(rows, schema=schema)
    write_table(store, path, table, use_dictionary=SAMPLES_DICTIONARY, column_encoding=SAMPLES_ENCODING)


def read_receipt(store: Store, path: str) -> Receipt:
    """Read the receipt from the footer of a sample table, without its rows.

    Raises:
        MissingError: There is no such table.
        UserError: It is damaged, or has no receipt.
    """
    with store.stream(path) as file, _damage_told(store, path):
        return _receipt(pq.read_schema(file))


def receipt_of(table: pa.Table, store: Store, path: str) -> Receipt:
    """Return the receipt of a sample table that was read from ``path``.

    Raises:
        UserError: It has none, or a damaged one.
    """
    with _damage_told(store, path):
        return _receipt(table.schema)


def _receipt(schema: pa.Schema) -> Receipt:
    fields = json.loads(schema.metadata[b"receipt"])
    fields["rejected"] = [(file, reason) for file, reason in fields["rejected"]]
    return Receipt(**fields)


def write_info(store: Store, info: Info) -> None:
    """Write ``dataset.json``: from now on the store holds a whole data set."""
    store.write(DATASET, (json.dumps(asdict(info), indent=1, sort_keys=True) + "\n").encode())


def write_manifest(
    store: Store, classes: list[str], paths: list[str], receipts: list[Receipt], build: dict, tars: str | None = None
) -> None:
    """Write ``shards.parquet`` and then ``dataset.json``, once all shards have their tables.

    Args:
        store: The data set.
        classes: Names.
        paths: Of the tars.
        receipts: Of the tars, in the same order.
        build: The settings that made it.
        tars: Where the tars are, if elsewhere.
    """
    rows: dict[str, list] = {
        "path": paths,
        "samples": [receipt.samples for receipt in receipts],
        "bytes": [receipt.bytes for receipt in receipts],
        "sha256": [receipt.sha256 for receipt in receipts],
    }
    write_table(store, SHARDS, pa.table(rows, schema=SHARDS_SCHEMA))
    info = Info(
        classes=classes,
        samples=sum(rows["samples"]),
        bytes=sum(rows["bytes"]),
        image_bytes=sum(receipt.image_bytes for receipt in receipts),
        shards=len(receipts),
        digest=digest(classes, rows["sha256"], build),
        build=build,
        tars=tars,
    )
    write_info(store, info)


def read_info(store: Store) -> Info:
    """Read the ``dataset.json`` of a store; over a network until it comes the same twice, since nothing else checks it.

    Raises:
        MissingError: There is none.
        UserError: As of ``parse_info``.
        PatchmillError: It comes otherwise each time.
    """
    data, before = store.read(DATASET), None
    for _ in range(TRIES):
        if store.local or data == before:
            return parse_info(data, store.url)
        data, before = store.read(DATASET), data
    raise PatchmillError(
        f"{store.url}/{DATASET} comes otherwise each time, {TRIES + 1} times; check the network and what is between "
        "this machine and the server"
    )


def parse_info(data: bytes, url: str) -> Info:
    """Parse the ``dataset.json`` of the data set at ``url``.

    Raises:
        UserError: It was written for another schema version, or is damaged.
    """
    try:
        fields = json.loads(data)
        if fields["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"the data set {url} has schema version {fields['schema_version']}, this Patchmill reads "
                f"{SCHEMA_VERSION}; build the data set again or use a Patchmill that fits"
            )
        info = Info(**fields)
        _check_info(info)
        return info
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{url}/{DATASET} is damaged ({error}); build the data set again") from error


def _check_info(info: Info) -> None:
    """Raise a ValueError or KeyError unless all has the form that readers rely on."""
    texts = isinstance(info.digest, str) and (info.tars is None or isinstance(info.tars, str))
    named = isinstance(info.classes, list) and all(isinstance(each, str) for each in info.classes)
    if not (texts and named and isinstance(info.build, dict)):
        raise ValueError("digest, tars, classes or build is of another type than it should")
    for name in ("samples", "bytes", "image_bytes", "shards"):
        if type(getattr(info, name)) is not int or getattr(info, name) < 0:
            raise ValueError(f"{name} is {getattr(info, name)!r}, no count")
    if info.build.get("source") == "index":
        if not all(isinstance(info.build[name], str) for name in ("label", "image")):
            raise ValueError("build does not tell how labels are read")
        info.build["classes"]  # a KeyError
