"""A run's checkpoints once more in a store, written beside the loop, from where a run on an empty disk goes on.

They lie there as on disk, and appear as there: files first, then ``checkpoint.json``, then the pointers.
"""

import hashlib
import json
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import checkpoint, distributed
from pipeline.troubles import INTERVALS, LEDGER
from shards.atomic import commit_folder, partial_folder, whole_file, write_text
from shards.errors import PatchmillError, UserError
from shards.ledger import keep_number
from shards.objects import MissingError
from shards.store import Store, open_store

BESIDE = (INTERVALS, LEDGER)  # of the stage's folder, which training needs besides
FILES = 4  # that are fetched at once


class Mirror:
    """Brings what is on disk to the store; rank 0 alone has one, and calls never wait but for ``finish``.

    Trouble with the store is told and tried again after the next save.

    Args:
        url: Of the store.
        folder: The run's ``checkpoints`` folder.
        keep: As in ``checkpoint.kept``.
        every: Likewise.
    """

    def __init__(self, url: str, folder: Path, keep: int, every: int | None):
        self._store, self._folder, self._keep, self._every = _open(url), folder, keep, every
        self._there: dict[str, bytes] | None = None  # index of each checkpoint in the store
        self._lock = threading.Lock()
        self._busy: Path | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._job: Future[None] | None = None
        self._behind: Exception | None = None
        if checkpoint.whole_checkpoints(folder):
            self.bring()  # what a start before this one could not

    def bring(self) -> None:
        """Begin to bring what is not in the store yet, the newest checkpoint first."""
        if self._job is None or self._job.running() or self._job.done():  # else it has yet to look what is there
            self._job = self._thread.submit(self._try)

    def busy(self) -> Path | None:
        """Return the checkpoint that is being read."""
        with self._lock:
            return self._busy

    def finish(self) -> None:
        """Wait until everything is there.

        Raises:
            PatchmillError: It cannot be brought there, even now.
        """
        if self._job is not None:
            self._job.result()
        if self._behind is not None:
            self._thread.submit(self._try).result()
        if self._behind is not None:
            raise PatchmillError(
                f"everything is saved in {self._folder}, but {self._store.url} lacks some of it: {self._behind}; mend "
                "that and run again, which brings it there"
            )

    def close(self) -> None:
        """Wait for what was begun."""
        self._thread.shutdown()

    def _try(self) -> None:
        try:
            self._bring()
            self._behind = None
        except (PatchmillError, OSError) as error:
            self._behind = error
            print(
                f"warning: the checkpoints in {self._folder} are not all in {self._store.url}: {error}; tried again "
                "after the next save",
                file=sys.stderr, flush=True,
            )  # fmt: skip
        finally:
            with self._lock:
                self._busy = None

    def _bring(self) -> None:
        if self._there is None:
            self._there = {name: self._store.read(f"{name}/checkpoint.json") for name in whole(self._store)}
        latest = checkpoint.pointer(self._folder, "latest")
        local = [each for each in checkpoint.whole_checkpoints(self._folder) if latest is None or each <= latest]
        for path in local:
            with self._lock:
                self._busy = path  # from here on it is not deleted
            try:
                index = (path / "checkpoint.json").read_bytes()
            except FileNotFoundError:  # it just was
                continue
            if self._there.get(path.name) != index:
                self._bring_one(path, index)
            if path == local[0]:
                self._point()
        self._prune()

    def _bring_one(self, path: Path, index: bytes) -> None:
        self._remove(path.name)  # another one of the same name, of which files would be mixed with these
        for file in json.loads(index)["files"]:
            name = f"{path.name}/{file['name']}"
            self._store.upload(name, path / file["name"])
            if (size := self._store.size(name)) != file["bytes"]:
                raise PatchmillError(f"{self._store.url}/{name} has {size} bytes, and not {file['bytes']}")
        self._store.write(f"{path.name}/checkpoint.json", index)
        self._there[path.name] = index

    def _point(self) -> None:
        for name in BESIDE:
            if (self._folder.parent / name).is_file():
                self._store.upload(name, self._folder.parent / name)
        for name in ("latest", "best"):
            target = checkpoint.pointer(self._folder, name)
            if target is not None and target.name in self._there:
                self._store.write(name, (target.name + "\n").encode())

    def _prune(self) -> None:
        stay = checkpoint.kept([checkpoint.samples_of(Path(name)) for name in self._there], self._keep, self._every)
        best = checkpoint.pointer(self._folder, "best")
        for name in list(self._there):
            if checkpoint.samples_of(Path(name)) not in stay and (best is None or name != best.name):
                self._remove(name)

    def _remove(self, name: str) -> None:
        self._store.delete(f"{name}/checkpoint.json")  # first: half of it must not look like a checkpoint
        self._there.pop(name, None)
        for file in self._store.list(name):
            self._store.delete(f"{name}/{file}")


def _open(url: str) -> Store:
    store = open_store(url, create=True)
    if store.web:
        raise UserError(f"checkpoint.mirror = {url!r} is a plain web server, which takes no files; give a bucket")
    return store


def whole(store: Store) -> list[str]:
    """Return the names of the checkpoints in a store, newest first."""
    names = [name.strip("/") for name in store.folders()]
    found = [name for name in names if name.startswith("samples-") and store.exists(f"{name}/checkpoint.json")]
    return sorted(found, reverse=True)


def fetch_newer(url: str, folder: Path, samples: int) -> bool:
    """Fetch the newest whole checkpoint of a mirror that is past so many samples; collective, rank 0 does it.

    Args:
        url: Of the mirror.
        folder: The run's ``checkpoints`` folder.
        samples: Of the newest whole checkpoint there; -1: there is none.

    Returns:
        Whether there was one.

    Raises:
        PatchmillError: The mirror cannot be reached, and there is nothing else to go on from.
    """
    found = checkpoint.together(folder, lambda: _fetch_newer(url, folder, samples), distributed.rank() == 0)
    return bool(found[0])


def _fetch_newer(url: str, folder: Path, samples: int) -> bool:
    try:
        store = _open(url)
        names = [name for name in whole(store) if checkpoint.samples_of(Path(name)) > samples]
    except UserError:
        raise
    except PatchmillError as error:
        if samples >= 0:
            print(f"warning: {url} cannot be asked for newer checkpoints: {error}", file=sys.stderr, flush=True)
            return False
        raise PatchmillError(
            f"nobody knows whether {url} has a checkpoint to go on from: {error}; mend that, or unset checkpoint.mirror"
        ) from error
    for name in names:
        try:
            _fetch(store, name, folder)
        except (checkpoint.BrokenCheckpointError, MissingError) as error:
            print(f"warning: {error} (falling back to the one before)", file=sys.stderr, flush=True)
            continue
        print(f"going on from {url}/{name}", file=sys.stderr, flush=True)
        return True
    return False


def _fetch(store: Store, name: str, folder: Path) -> None:
    """Bring one checkpoint to disk, verified, and what training needs besides where it is not there."""
    index = store.read(f"{name}/checkpoint.json")
    try:
        told = json.loads(index)
        files: list[dict[str, Any]] = told["files"]
    except (ValueError, KeyError):
        raise checkpoint.BrokenCheckpointError(f"{store.url}/{name} has no readable checkpoint.json") from None
    checkpoint.check_room(folder, sum(file["bytes"] for file in files))
    partial = partial_folder(folder / name)
    with ThreadPoolExecutor(FILES, thread_name_prefix="fetch") as threads:
        list(threads.map(lambda file: _fetch_file(store, name, file, partial), files))
    write_text(partial / "checkpoint.json", index.decode())
    commit_folder(partial, folder / name)
    for beside in BESIDE:
        if not (folder.parent / beside).exists() and store.exists(beside):
            with whole_file(folder.parent / beside) as file:
                file.write_bytes(store.read(beside))
    keep_number(folder.parent / "ledger", told["state"].get("loader", {}).get("ledger"))


def _fetch_file(store: Store, name: str, file: dict[str, Any], partial: Path) -> None:
    digest = hashlib.sha256()
    source = f"{name}/{file['name']}"
    with whole_file(partial / file["name"]) as target, open(target, "wb") as out, store.stream(source) as stream:
        while block := stream.read(2**24):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != file["sha256"]:
        raise checkpoint.BrokenCheckpointError(
            f"{store.url}/{source} does not have the checksum it was written with; use another checkpoint"
        )
