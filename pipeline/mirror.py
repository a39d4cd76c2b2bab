"""A run's checkpoints once more in a store, written beside the loop, from where a run on an empty disk goes on.

They lie there as on disk, and appear as there: files first, then ``checkpoint.json``, then the pointers.
"""

import fnmatch
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline import checkpoint, checksum, distributed
from pipeline.checkpoint import Checkpoint
from pipeline.checkpointindex import BrokenCheckpointError, read_index
from pipeline.troubles import INTERVALS, LEDGER
from shards.atomic import commit_folder, whole_file, write_text
from shards.errors import PatchmillError, UserError
from shards.ledger import keep_number
from shards.objects import MissingError
from shards.store import Store, open_store
from shards.storesettings import StoreSettings

BESIDE = (INTERVALS, LEDGER)  # of the stage's folder, which training needs besides
BEGUN = "begun.json"  # the index that the files in a checkpoint's folder are of, while they are brought
FILES = 4  # that are fetched at once


class Mirror:
    """Brings what is on disk to the store; rank 0 alone has one, and calls never wait but for ``finish``.

    Trouble with the store is told and tried again after the next save.

    Args:
        url: Of the store.
        folder: The run's ``checkpoints`` folder.
        keep: As in ``checkpoint.superseded``.
        every: Likewise.
    """

    def __init__(self, url: str, folder: Path, keep: int, every: int | None):
        self._store, self._folder, self._keep, self._every = open_mirror(url), folder, keep, every
        self._there: dict[str, bytes] = {}  # index of each checkpoint in the store, once it was looked at
        self._looked = False
        self._lock = threading.Lock()
        self._busy: Path | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mirror")
        self._job: Future[None] | None = None
        self._behind = ""  # what the last try failed of
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
        if self._behind:
            self._thread.submit(self._attempt).result()
        if self._behind:
            raise PatchmillError(
                f"everything is saved in {self._folder}, but {self._store.url} lacks some of it: {self._behind}; mend "
                "that and run again, which brings it there"
            )

    def close(self) -> None:
        """Wait for what was begun."""
        self._thread.shutdown()

    def _try(self) -> None:
        self._attempt()
        if self._behind:
            print(
                f"warning: the checkpoints in {self._folder} are not all in {self._store.url}: {self._behind}; tried "
                "again after the next save, and at the end",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def _attempt(self) -> None:
        self._behind = ""
        try:
            self._bring()
        except (PatchmillError, OSError) as error:
            self._behind = str(error)
        except Exception as error:  # noqa: BLE001 (nobody else would hear of it)
            self._behind = repr(error)
        finally:
            with self._lock:
                self._busy = None

    def _bring(self) -> None:
        if not self._looked:
            self._there = {name: self._store.read(f"{name}/checkpoint.json") for name in whole(self._store)}
            self._looked = True
        latest = checkpoint.pointer(self._folder, "latest")
        local = [each for each in checkpoint.whole_checkpoints(self._folder) if latest is None or each <= latest]
        broken: BrokenCheckpointError | None = None
        for path in local:
            with self._lock:
                self._busy = path  # from here on it is not deleted
            try:
                index = (path / "checkpoint.json").read_bytes()
                if self._there.get(path.name) != index:
                    self._bring_one(path, index)
            except FileNotFoundError:  # it just was
                continue
            except BrokenCheckpointError as error:  # on disk, which keeps no other from being brought
                broken = broken or error
            if path == local[0]:
                for name in BESIDE:
                    if (self._folder.parent / name).is_file():
                        self._store.upload(name, self._folder.parent / name)
                self._point("latest")
        self._point("best")
        self._prune()
        if broken:
            raise broken

    def _bring_one(self, path: Path, index: bytes) -> None:
        found, begun = Checkpoint(path), f"{path.name}/{BEGUN}"
        if not self._store.exists(begun) or self._store.read(begun) != index:
            self._remove(path.name)  # another one of the same name, of which files would be mixed with these
            self._store.write(begun, index)
        for file in found.files:
            name = f"{path.name}/{file['name']}"
            if self._size(name) == file["bytes"]:  # an earlier try brought it
                continue
            found.verify([file])
            self._store.upload(name, path / file["name"])
            if (size := self._size(name)) != file["bytes"]:
                raise PatchmillError(f"{self._store.url}/{name} has {size} bytes, and not {file['bytes']}")
        self._store.delete(begun)
        self._store.write(f"{path.name}/checkpoint.json", index)
        self._there[path.name] = index

    def _size(self, name: str) -> int | None:
        try:
            return self._store.size(name)
        except MissingError:
            return None

    def _point(self, name: str) -> None:
        target = checkpoint.pointer(self._folder, name)
        if target is not None and target.name in self._there:
            self._store.write(name, (target.name + "\n").encode())

    def _prune(self) -> None:
        pointers = _pointer(self._store, "latest"), _pointer(self._store, "best")
        for name in checkpoint.superseded(self._there, *pointers, self._keep, self._every):
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._store.delete(f"{name}/checkpoint.json")  # first: half of it must not look like a checkpoint
        self._there.pop(name, None)
        for file in self._store.list(name):
            self._store.delete(f"{name}/{file}")


def open_mirror(url: str, settings: StoreSettings | None = None) -> Store:
    """Open the store of a mirror; a plain web server is a UserError."""
    store = open_store(url, create=True, settings=settings)
    if store.web:
        raise UserError(f"checkpoint.mirror = {url!r} is a plain web server, which takes no files; give a bucket")
    return store


def whole(store: Store) -> list[str]:
    """Return the names of the checkpoints in a store, newest first."""
    names = fnmatch.filter((name.strip("/") for name in store.folders()), checkpoint.NAMES)
    return sorted((name for name in names if store.exists(f"{name}/checkpoint.json")), reverse=True)


def _pointer(store: Store, name: str) -> str | None:
    """Return the name of the checkpoint that ``latest`` or ``best`` of a store names, if it is there."""
    target = store.read(name).decode(errors="replace").strip() if store.exists(name) else ""
    there = fnmatch.fnmatchcase(target, checkpoint.NAMES) and store.exists(f"{target}/checkpoint.json")
    return target if there else None


def fetch_newer(
    url: str, folder: Path, samples: int, suits: Callable[[dict[str, Any], str], object]
) -> tuple[str | None, list[str]]:
    """Fetch the newest whole checkpoint of a mirror that is past so many samples; collective, rank 0 does it.

    The best one comes along, if there is one to fetch.

    Args:
        url: Of the mirror.
        folder: The run's ``checkpoints`` folder.
        samples: Of the newest whole checkpoint there; -1: there is none.
        suits: Raises an error unless the run may go on from a checkpoint, given its state and where it is.

    Returns:
        The name of the one that is on disk now, if any, and which newer ones are broken there.

    Raises:
        PatchmillError: The mirror cannot be reached, and there is nothing else to go on from.
        UserError: Of ``suits``, before anything is fetched.
    """
    fetch = partial(_fetch_newer, url, folder, samples, suits)
    return checkpoint.together(folder, fetch, distributed.rank() == 0, doing=f"fetch a checkpoint from {url} to")[0]


def _fetch_newer(
    url: str, folder: Path, samples: int, suits: Callable[[dict[str, Any], str], object]
) -> tuple[str | None, list[str]]:
    try:
        store = open_mirror(url)
        names = [name for name in whole(store) if checkpoint.samples_of(Path(name)) > samples]
        best = _pointer(store, "best") if names else None
    except UserError:
        raise
    except PatchmillError as error:
        if samples >= 0:
            print(f"warning: {url} cannot be asked for newer checkpoints: {error}", file=sys.stderr, flush=True)
            return None, []
        raise PatchmillError(
            f"nobody knows whether {url} has a checkpoint to go on from: {error}; mend that, or unset checkpoint.mirror"
        ) from error

    @cache
    def problem_of(name: str) -> PatchmillError | None:
        """Fetch a checkpoint; return what is wrong with it."""
        try:
            _fetch(store, name, folder, suits)
        except (BrokenCheckpointError, MissingError) as error:
            return error
        return None

    if best is not None:  # first: who is killed before the newest one is here fetches that the next time
        here = best not in names and (folder / best / "checkpoint.json").is_file()
        if problem := None if here else problem_of(best):
            print(f"warning: the best checkpoint is not fetched: {problem}", file=sys.stderr, flush=True)
        else:
            write_text(folder / "best", best + "\n")
    broken: list[str] = []
    for name in names:
        if not (problem := problem_of(name)):
            print(f"going on from {url}/{name}", file=sys.stderr, flush=True)
            return name, broken
        broken.append(f"{url}/{name}")
        print(checkpoint.passed_over(problem, name != names[-1] or samples >= 0), file=sys.stderr, flush=True)
    return None, broken


def _fetch(store: Store, name: str, folder: Path, suits: Callable[[dict[str, Any], str], object]) -> None:
    """Bring one checkpoint to disk, verified, and what training needs besides where it is not there."""
    text, where = store.read(f"{name}/checkpoint.json"), f"{store.url}/{name}"
    index = read_index(text, where)
    suits(index.state, where)
    unfinished = folder / f".{name}.partial"
    lacking = _lacking(unfinished, index.files)
    size = sum(file["bytes"] for file in lacking)
    checkpoint.check_room(folder, size)
    print(f"fetching {where}, {size / 1e9:.3g} GB", file=sys.stderr, flush=True)
    try:
        with ThreadPoolExecutor(FILES, thread_name_prefix="fetch") as threads:
            list(threads.map(lambda file: _fetch_file(store, name, file, unfinished), lacking))
    except (BrokenCheckpointError, MissingError):
        shutil.rmtree(unfinished)  # else what was fetched stays, and the next start fetches the rest
        raise
    write_text(unfinished / "checkpoint.json", text.decode())
    commit_folder(unfinished, folder / name)
    for beside in BESIDE:
        if not (folder.parent / beside).exists() and store.exists(beside):
            with whole_file(folder.parent / beside) as file:
                file.write_bytes(store.read(beside))
    keep_number(folder.parent / "ledger", index.state.get("loader", {}).get("ledger"))


def _lacking(folder: Path, files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return which files a folder lacks, after removing what is none of them; it is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {file["name"] for file in files}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()
    return [file for file in files if not _is_there(folder / file["name"], file)]


def _is_there(path: Path, file: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != file["bytes"]:
        return False
    return checksum.matches(path, file)


def _fetch_file(store: Store, name: str, file: dict[str, Any], folder: Path) -> None:
    source = f"{name}/{file['name']}"
    with whole_file(folder / file["name"]) as target:
        with open(target, "wb") as out, store.stream(source) as stream:
            shutil.copyfileobj(stream, out, 2**24)
        if not checksum.matches(target, file):
            raise BrokenCheckpointError(
                f"{store.url}/{source} does not have the checksum it was written with; use another checkpoint"
            )
