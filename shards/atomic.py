"""Files and folders that appear under their name whole, or not at all."""

import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.errors import PatchmillError, UserError

ASIDE = ".replaced.partial"  # ends the name of a folder that another one is about to replace
TRIES = 20  # at a lock in a folder that others remove
LOCK = ".lock"  # in a folder: its lock stands for the folder. Over NFS each machine locks folders for itself alone


def fsync_folder(folder: Path) -> None:
    """Make the renames inside ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on a clean exit it is flushed and renamed, else removed.

    The temporary name starts with a dot and ends in ``.partial``, so readers and globs pass it over. It is
    the same for every try: what a killed process left behind is overwritten by the next one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old content or the new, never a part."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def partial_folder(path: str | Path) -> Path:
    """Return an empty temporary folder beside ``path``, to be filled and handed to ``commit_folder``."""
    path = Path(path)
    _put_back(path)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit_folder(partial: Path, path: str | Path) -> None:
    """Rename a folder whose files are already flushed to its final name, replacing an older one.

    For a moment neither has it. Who is killed then loses nothing: ``put_back`` and ``partial_folder`` mend that.
    """
    path = Path(path)
    fsync_folder(partial)
    doomed = path.parent / f".{path.name}{ASIDE}"
    if path.exists():
        os.replace(path, doomed)
    os.replace(partial, path)
    fsync_folder(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def put_back(parent: Path) -> None:
    """Give folders in ``parent`` the names that a kill inside ``commit_folder`` took; while none is made."""
    for aside in parent.glob(f".*{ASIDE}"):
        _put_back(parent / aside.name[1:].removesuffix(ASIDE))


def _put_back(path: Path) -> None:
    aside = path.parent / f".{path.name}{ASIDE}"
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside.exists():
        os.replace(aside, path)


@contextmanager
def only_one(folder: Path, doing: str, wait: float = 0.0, shared: bool = False, told: bool = False) -> Iterator[None]:
    """Keep every other process that asks the same out of ``folder``; the lock goes with the process, however that ends.

    Args:
        folder: Made if it is not there.
        doing: For the error: ``"build"``, ``"training run"``.
        wait: Seconds to wait for a process that may be on its way out.
        shared: Let others in that ask with ``shared`` too, and keep only the rest out.
        told: Say on stderr that it waits.

    Raises:
        UserError: Another process is at it.
        PatchmillError: Nothing can be written to ``folder``.
    """
    descriptor, deadline = None, time.monotonic() + wait
    while descriptor is None:
        try:
            descriptor = hold(folder, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(f"another {doing} is writing to {folder}; wait for it or stop it") from None
            if told:
                print(f"waiting for another {doing}, which is writing to {folder}", file=sys.stderr, flush=True)
                told = False
            time.sleep(0.2)
        except OSError as error:
            raise PatchmillError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        if not shared and _is_at(folder / LOCK, descriptor):  # else the folder has another name since
            with suppress(OSError):  # it may stay
                (folder / LOCK).unlink()
        os.close(descriptor)


def hold(folder: Path, how: int) -> int:
    """Lock a folder, which is made if it is not there, until the descriptor that is returned is closed.

    Args:
        folder: The folder.
        how: As of ``fcntl.flock``.

    Raises:
        BlockingIOError: Another process has it, and ``how`` says not to wait.
        OSError: Nothing can be written to it.
    """
    while True:
        descriptor = _open_lock(folder)
        try:
            fcntl.flock(descriptor, how)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return descriptor  # some network file systems lock nothing
            os.close(descriptor)
            if error.errno == errno.ESTALE:  # who had it before removed it meanwhile
                continue
            raise
        if _is_at(folder / LOCK, descriptor):
            return descriptor
        os.close(descriptor)  # likewise


def _open_lock(folder: Path) -> int:
    """Open the lock of a folder; both are made if they are not there."""
    for left in reversed(range(TRIES)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mode = folder.stat().st_mode & 0o666
            # Over NFS only who may write may lock alone. No link: others may write to the folder, and it is changed.
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            break
        except (FileNotFoundError, FileExistsError):  # who had it before may have removed the folder meanwhile
            if not left:
                raise
    with suppress(OSError):  # somebody else made it, or there are no modes here
        os.fchmod(descriptor, mode)  # who may write to the folder may lock it
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Tell whether an open file is the one at a path; opened, since over NFS nothing else is sure to ask the server."""
    try:
        there = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.path.samestat(os.fstat(there), os.fstat(descriptor))
    finally:
        os.close(there)


def is_held(folder: Path, unknown: bool, shared: bool = False) -> bool:
    """Tell whether a process has ``folder`` to itself, as of ``only_one``; ``unknown`` where nobody can tell.

    With ``shared`` also whether some share it.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR if shared else os.O_RDONLY)  # as _open_lock: to lock it alone
    except FileNotFoundError:
        return False
    except OSError:
        return unknown
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if shared else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return unknown
    finally:
        os.close(descriptor)
    return False
