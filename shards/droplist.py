"""Drop lists: samples that a data set leaves out. Each has a name, and never changes once written."""

import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from shards import manifest
from shards.dataset import Dataset
from shards.errors import UserError
from shards.objects import ExistsError
from shards.store import open_store


def write_exclude(url: str | Path, version: str, rows: Iterable[tuple[int, int, str]]) -> None:
    """Write a drop list, for ``Dataset.open(url, exclude=version)``; on any store that takes files.

    Args:
        url: The data set.
        version: A new name; a drop list never changes once written.
        rows: (shard, raw index in the shard, reason) of each sample to drop. Raw: as without any drop list.

    Raises:
        UserError: The version exists, its name is no plain word, a row names no sample or one twice, or the data set
            takes no files.
    """
    dataset = Dataset.open(url)
    check_version(dataset, version)
    rows = sorted(rows)
    for shard, index, _ in rows:
        if not (0 <= shard < len(dataset.shard_sizes) and 0 <= index < dataset.shard_sizes[shard]):
            raise UserError(f"drop list {version}: {url} has no sample {index} in shard {shard}; count from 0")
    for (shard, index, _), following in pairwise(rows):
        if following[:2] == (shard, index):
            raise UserError(f"drop list {version}: sample {index} of shard {shard} is listed twice; drop it once")
    columns = [[row[i] for row in rows] for i in range(3)]
    data = manifest.table_bytes(pa.table(columns, schema=manifest.EXCLUDE_SCHEMA))
    try:
        dataset.store.create(manifest.exclude_path(version), data)
    except ExistsError as error:
        raise UserError(f"drop list {version} of {url} exists and never changes; choose another name") from error


def check_exclude_name(version: str) -> None:
    """Raise a UserError unless ``version`` is a name that a drop list can have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", version):
        raise UserError(f"drop list name {version!r}: use letters, digits, dots, dashes and underscores")


def check_takes_lists(dataset: Dataset) -> None:
    """Raise a UserError if no drop list can be written to a data set, as on a web server."""
    if dataset.store.web:
        raise UserError(f"{dataset.url} takes no drop list: a web server; copy the data set first")


def check_version(dataset: Dataset, version: str) -> None:
    """Check the name of a drop list that is to be written later.

    Raises:
        UserError: It is no plain word, there is such a list already, or the data set is on a web server.
    """
    check_exclude_name(version)
    check_takes_lists(dataset)
    if dataset.store.exists(manifest.exclude_path(version)):
        raise UserError(f"drop list {version} of {dataset.url} exists and never changes; choose another name")


def read_exclude(url: str | Path, version: str | None) -> list[tuple[int, int, str]]:
    """Return the (shard, raw index, reason) of all samples that a drop list drops; none for None.

    Raises:
        UserError: There is no such drop list.
    """
    table = manifest.open_exclude(open_store(url), version)
    return list(zip(*(table[name].to_pylist() for name in table.column_names), strict=True))
