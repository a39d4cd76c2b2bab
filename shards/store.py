"""Reads and writes the objects of a data set, in a local folder or any store that ``obstore`` knows.

Both kinds offer the same calls and are safe to use from many threads. What is written appears whole or not at all.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from shards.errors import UserError
from shards.localstore import LocalStore
from shards.objects import MissingError
from shards.remotestore import RemoteStore
from shards.storesettings import StoreSettings
from shards.urls import parts_of, refuse_secrets

Store = LocalStore | RemoteStore


def open_store(url: str | Path, create: bool = False, settings: StoreSettings | None = None) -> Store:
    """Open a local path or a ``file://``, ``http(s)://``, ``s3://``, ``gs://`` or ``az://`` URL.

    Args:
        url: Of a folder, a bucket or a prefix in it.
        create: Make a local folder that is missing.
        settings: Of a remote store; by default those of the environment.

    Raises:
        UserError: The local folder is missing, the URL is of no known kind, or it carries a secret.
    """
    parts = parts_of(str(url))
    if "://" in str(url) and parts.scheme != "file":
        refuse_secrets(str(url))
        return RemoteStore(str(url).rstrip("/"), settings or StoreSettings())
    root = Path(unquote(parts.path)) if parts.scheme == "file" else Path(url)
    if create:
        root.mkdir(parents=True, exist_ok=True)
    if not os.path.isdir(root):  # also of a name too long for any
        raise MissingError(f"no folder {root}; check the path")
    return LocalStore(root)


def absolute(url: str | Path) -> str:
    """Return a URL as it is, and a local path so that it holds in any working folder."""
    return str(url) if "://" in str(url) else os.path.abspath(url)


def local_path(path: str | Path, name: str) -> Path:
    """Return a path to write to on this machine; ``name`` is what the user calls it.

    Raises:
        UserError: It is a URL.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UserError(f"{name} {path}: must be a local path")
    return Path(path)
