"""Which tars a URL means: those of a folder, of a pattern, or one."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from shards.errors import UserError
from shards.objects import MissingError
from shards.store import Store, open_store
from shards.storesettings import StoreSettings

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def find_tars(url: str | Path, settings: StoreSettings | None = None) -> tuple[Store, list[str]]:
    """Find tars. Folders below are left alone unless a pattern names them: mostly they are other splits or sets.

    Args:
        url: A folder or bucket prefix; a pattern with ``{000..146}`` or ``{train,val}``, in the order it gives, or with
            ``*``, ``?`` and ``[0-9]``, sorted, which a plain web server cannot list; or one tar.
        settings: Of a remote store; by default those of the environment.

    Returns:
        The folder that all lie in, and their paths in it.

    Raises:
        UserError: There are none, or they are of several splits.
    """
    text = str(url).rstrip("/")
    web = text.startswith(("http://", "https://"))
    magic = "{" if web else "{*?["
    if any(sign in text for sign in magic) and ("://" in text or not Path(text).is_dir()):
        return _of_pattern(text, magic, settings)
    if text.endswith(".tar") and ("://" in text or not Path(text).is_dir()):
        folder, _, name = text.rpartition("/")
        store = open_store(folder or ("/" if text.startswith("/") else "."), settings=settings)
        store.size(name)
        return store, [name]
    store = open_store(text, settings=settings)
    names = store.list("")
    tars = [name for name in names if name.endswith(".tar") and not name.startswith(".")]
    if not tars:
        raise UserError(f"no tars in {store.url}{_hint(store, names)}")
    _one_split(store, names)
    return store, tars


def _of_pattern(text: str, magic: str, settings: StoreSettings | None) -> tuple[Store, list[str]]:
    first = min(text.index(sign) for sign in magic if sign in text)
    folder, _, pattern = text[:first].rpartition("/")
    pattern += text[first:]
    store = open_store(folder or ("/" if text.startswith("/") else "."), settings=settings)
    try:
        expanded = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise UserError(f"pattern {text}: a brace is not closed; write x-{{000..146}}.tar") from error
    tars = []
    for each in expanded:
        if any(sign in each for sign in magic if sign != "{"):
            there = store.list("", below="/" in each)
            tars += [name for name in there if name.endswith(".tar") and _matches(name, each)]
        else:
            tars.append(each)
    if not tars:
        raise UserError(f"no tar fits {text}; check the pattern")
    if len(set(tars)) < len(tars):
        raise UserError(f"pattern {text} names a tar twice; name each once")
    return store, tars


def _matches(name: str, pattern: str) -> bool:
    """Compare part by part: a star goes over no slash, and finds no hidden file."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(
        fnmatchcase(part, each) and (each.startswith(".") or not part.startswith("."))
        for part, each in zip(parts, patterns, strict=True)
    )


def _hint(store: Store, names: list[str]) -> str:
    packed = [name for name in names if name.endswith(_PACKED)]
    if packed:
        return f", but compressed ones such as {packed[0]}; unpack them to plain .tar first, to read images one by one"
    below = [folder for folder in store.folders() if any(name.endswith(".tar") for name in store.list(folder))]
    if below:
        return (
            f" itself, but in its folders {', '.join(below[:5])}; give one of them, or a pattern: {store.url}/*/*.tar"
        )
    return "; check the path"


def _one_split(store: Store, names: list[str]) -> None:
    """Refuse a folder that holds several splits side by side, as timm's sets say in ``_info.json``."""
    for name in ("_info.json", "info.json"):
        if name in names:
            try:
                splits = json.loads(store.read(name))["splits"]
                some = {split: splits[split]["filenames"][0] for split in splits}
            except (MissingError, ValueError, KeyError, TypeError, IndexError):
                continue  # somebody else's file
            if len(some) > 1:
                listed = ", ".join(f"{split} ({first}, ...)" for split, first in some.items())
                raise UserError(
                    f"{store.url} holds several splits: {listed}; index each on its own, with a pattern and --out"
                )
