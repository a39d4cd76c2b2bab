"""Opens a source: finds out its kind by looking at it."""

import inspect
import re
import tarfile
import zlib
from itertools import islice
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote

from shards.errors import UserError
from shards.sources import Source, cifar, place
from shards.sources.cifar import Cifar
from shards.sources.flowers import Flowers
from shards.sources.folder import EXTENSIONS, Folder
from shards.sources.imagenet import CLASS_TAR, TRAIN, VAL, ImageNet, is_tar_of_tars, is_validation
from shards.sources.lists import Lists
from shards.sources.objectnet import ObjectNet
from shards.sources.parquet import Parquet, image_columns, read_schema
from shards.sources.pets import Pets
from shards.sources.table import Table
from shards.sources.tars import Tars
from shards.store import Store, open_store
from shards.urls import parts_of, refuse_secrets

KINDS: dict[str, type[Source]] = {
    "folder": Folder,
    "table": Table,
    "parquet": Parquet,
    "cifar": Cifar,
    "imagenet": ImageNet,
    "pets": Pets,
    "flowers": Flowers,
    "lists": Lists,
    "objectnet": ObjectNet,
    "tars": Tars,
}
ENDINGS = {  # of the files that a kind takes beside folders
    "parquet": (".parquet",),
    "cifar": (".tar.gz", ".tgz", ".tar"),
    "imagenet": (".tar", ".tar.gz", ".tgz"),
    "tars": (".tar",),
}
LISTED = ("parquet", "cifar")  # kinds that can list images that they have not unpacked
LOOK = 1000  # files of a folder that are looked at to find out its kind


def open_source(
    url: str | Path, kind: str | None = None, *, unpacked: Path, to_read: bool = True, **options: object
) -> Source:
    """Open a source of images.

    Args:
        url: Path or URL of a file or folder.
        kind: One of ``KINDS``; found out by looking if it is not given.
        unpacked: Local folder for what cannot be read in place; made when something needs it.
        to_read: False: the images are only listed. Those of Parquet and CIFAR are not unpacked then, and have the size
            -1; a compressed tar of tars is, since nothing else tells what is in it.
        options: Of the kind of source; see the classes in ``KINDS``.

    Raises:
        UserError: There is nothing, or nothing that we know, or an option that the kind does not take.
    """
    url = _plain(str(url))
    if "://" in url:
        refuse_secrets(url)
    if kind is None:
        kind = find_kind(url)
    elif kind not in KINDS:
        raise UserError(f"no source of kind {kind}; the kinds are {', '.join(KINDS)}")
    endings = ENDINGS.get(kind, ())
    if kind != "table" and Path(url).is_file() and not url.lower().endswith(endings):  # a table tells its own
        raise UserError(
            f"source {url} is a file, and one of kind {kind} is {' or '.join(['a folder', *endings])}; "
            "leave --kind away to have the kind found out"
        )
    takes = set(inspect.signature(KINDS[kind]).parameters) - {"root", "url", "unpacked"}
    for name in options:
        if name not in takes:
            these = f"it takes {', '.join(sorted(takes))}" if takes else "it takes none"
            raise UserError(f"a source of kind {kind} has no option {name}; {these}")
    return cast(Any, KINDS[kind])(url, unpacked if to_read or kind not in LISTED else None, **options)


def find_kind(url: str) -> str:
    """Find out the kind of a source from its name and from what is inside.

    Raises:
        UserError: There is nothing, or it could be none or several of the kinds.
    """
    remote = "://" in url
    root, name = place(url)
    if name.endswith(".tar") and re.search(r"[{*?\[]", url) and (remote or not Path(url).exists()):
        return "tars"
    if Path(url).is_file() if not remote else re.search(r"\.(csv|jsonl|parquet|tar|gz|tgz)$", name.lower()):
        kinds = _kinds_of_file(open_store(root), name)
    elif remote or Path(url).is_dir():
        kinds = _kinds_of_folder(open_store(url))
    else:
        raise UserError(f"no folder or file {url}; check the path")
    if len(kinds) == 1:
        return kinds.pop()
    what = f"could be {' or '.join(sorted(kinds))}" if kinds else "is nothing that is known here"
    raise UserError(f"source {url} {what}; say which of the kinds it is: {', '.join(KINDS)}")


def _kinds_of_file(store: Store, name: str) -> set[str]:
    """Return the kinds that a file could be."""
    end = name.lower()
    if end.endswith((".csv", ".jsonl")):
        return {"table"}
    if end.endswith(".parquet"):
        return {"parquet" if image_columns(read_schema(store, name)) else "table"}
    if end.endswith((".tar.gz", ".tgz")):
        first = _first_name(store, name)
        if cifar.is_mark(first):
            return {"cifar"}
        if first.endswith(".tar"):
            return {"imagenet"}
        raise UserError(
            f"{store.url}/{name} is a compressed tar, neither of CIFAR nor of class tars; unpack it to a "
            "plain .tar first, in which images can be read one by one"
        )
    if end.endswith(".tar"):
        return {"imagenet"} if is_tar_of_tars(store, name) or is_validation(store, name) else {"tars"}
    return set()


def _first_name(store: Store, name: str) -> str:
    """Return the name of the first file in a compressed tar."""
    try:
        with store.stream(name) as stream, tarfile.open(fileobj=stream, mode="r|gz") as archive:
            return next((member.name for member in archive if member.isreg()), "")
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{store.url}/{name} is no tar, or a damaged one: {error}; get it again") from error


def _kinds_of_folder(store: Store) -> set[str]:
    """Return the kinds that a folder could be, by the files that come first; at least it may try to be images."""
    kinds = set()
    for entry in islice(store.walk(), LOOK):
        if entry.size < 0:  # a pipe could be waited for for ever
            continue
        folder, _, name = entry.path.rpartition("/")
        if not folder and (name in (TRAIN, VAL) or CLASS_TAR.fullmatch(name)):
            kinds.add("imagenet")
        elif cifar.is_mark(f"{store.url}/{entry.path}") and folder.count("/") == 0:
            kinds.add("cifar")
        elif name.endswith(".tar") and not folder:
            kinds.add("tars")
        elif name.endswith(".parquet") and "parquet" not in kinds and image_columns(read_schema(store, entry.path)):
            kinds.add("parquet")
        elif folder and name.lower().endswith(EXTENSIONS):
            kinds.add("folder")
    if "imagenet" in kinds:  # with other tars beside
        kinds.discard("tars")
    marked = {name for name, kind in KINDS.items() if kind.mark and store.exists(kind.mark)}
    return marked or kinds or {"folder"}


def _plain(url: str) -> str:
    """Return a local path as it is, of a ``file://`` URL its path, of other URLs no slash at the end."""
    if url.startswith("file://"):
        return unquote(parts_of(url).path)
    return url.rstrip("/") if "://" in url else url
