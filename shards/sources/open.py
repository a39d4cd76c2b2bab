"""Opens a source: finds out its kind by looking at it."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from shards.errors import UserError
from shards.sources import Source, place
from shards.sources.folder import Folder
from shards.store import Store, open_store

KINDS: dict[str, Callable[..., Source]] = {"folder": Folder}


def open_source(url: str | Path, kind: str | None = None, *, unpacked: Path, **options: object) -> Source:
    """Open a source of images.

    Args:
        url: Path or URL of a file or folder.
        kind: One of ``KINDS``; found out by looking if it is not given.
        unpacked: Local folder for what cannot be read in place; made when something needs it.
        options: Of the kind of source; see the classes in ``KINDS``.

    Raises:
        UserError: There is nothing, or nothing that we know, or an option that the kind does not take.
    """
    url = _plain(str(url))
    if kind is None:
        kind = find_kind(url)
    elif kind not in KINDS:
        raise UserError(f"no source of kind {kind}; the kinds are {', '.join(KINDS)}")
    takes = set(inspect.signature(KINDS[kind]).parameters) - {"root", "url", "unpacked"}
    for name in options:
        if name not in takes:
            these = f"it takes {', '.join(sorted(takes))}" if takes else "it takes none"
            raise UserError(f"a source of kind {kind} has no option {name}; {these}")
    return KINDS[kind](url, unpacked, **options)


def find_kind(url: str) -> str:
    """Find out the kind of a source from its name and from what is inside.

    Raises:
        UserError: There is nothing, or it could be none or several of the kinds.
    """
    remote = "://" in url
    root, name = place(url)
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
    return set()


def _kinds_of_folder(store: Store) -> set[str]:
    """Return the kinds that a folder could be; a folder of folders, or of nothing, at least tries to be images."""
    return {"folder"}


def _plain(url: str) -> str:
    """Return a local path as it is, of a ``file://`` URL its path, of other URLs no slash at the end."""
    if url.startswith("file://"):
        return unquote(urlsplit(url).path)
    return url.rstrip("/") if "://" in url else url
