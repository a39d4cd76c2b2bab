"""A manifest for tars made elsewhere, which stay as they are: one sequential read each, then they train like our own.

Tars are independent jobs (tarindex.py), so any number of workers makes the same manifest, and a killed index goes on
where it was. Where labels are names, all tables are numbered once every name is known.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from shards import manifest
from shards.atomic import only_one
from shards.classes import name_classes, read_classes
from shards.errors import UserError
from shards.labels import LabelRule
from shards.localstore import LocalStore
from shards.manifest import Receipt
from shards.objects import MissingError
from shards.progress import ImageProgress
from shards.rejected import too_many
from shards.store import Store, open_store
from shards.tarindex import Job, Reading, finished, index_tar, renumber
from shards.tarlist import find_tars
from shards.workers import cores, run_jobs

_BYTES_A_WORKER = 100 << 20  # a process starts in the time that another reads these


@dataclass(frozen=True)
class Indexed:
    """What an index holds.

    Attributes:
        url: Of the data set.
        tars: Folder or URL of the tars.
        classes: Names.
        samples: That have a row.
        shards: Number of tars.
        bytes: Of all tars.
        read: How many tars were read just now; the others were as an earlier run left them.
        unlabelled: Samples without label.
        rejected: (tar and key, reason) of each sample that has no row.
        skipped: Members that belong to no sample, by kind.
        trailing: Bytes behind the end of each archive that has some, by tar.
    """

    url: str
    tars: str
    classes: list[str]
    samples: int
    shards: int
    bytes: int
    read: int
    unlabelled: int
    rejected: list[tuple[str, str]]
    skipped: dict[str, int]
    trailing: dict[str, int]


def index(
    url: str | Path,
    out: str | Path | None = None,
    *,
    label: str = "",
    image: str = "",
    classes: str | Path | None = None,
    workers: int | None = None,
    max_rejected: int = 0,
    progress: bool = False,
) -> Indexed:
    """Make a manifest for tars that lie at ``url``; run again, it goes on where it was, and reads what has changed.

    Args:
        url: What ``find_tars`` takes: a folder, a pattern, or one tar.
        out: Folder or URL of the data set to make; by default the folder of the tars.
        label: Where labels stand, ``EXTENSION`` or ``EXTENSION:FIELD``; by default in ``cls``, or else in ``json``.
        image: Extension of the image, where a sample has several.
        classes: Path or URL of a file with the name of a class a line. Otherwise the classes are all names found,
            sorted, or numbers.
        workers: Processes; by default one for each core this process may use, as far as starting them pays.
            No influence on the manifest.
        max_rejected: So many samples without a whole image, or with labels that make no sense, are left out, and listed
            in the receipts; one more is an error.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: There are no tars, some are damaged, labels cannot be understood, or ``out`` holds something else.
        PatchmillError: The network or a worker failed.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    if max_rejected < 0:
        raise UserError(f"--max-rejected {max_rejected}: must be at least 0")
    tars, paths = find_tars(url)
    reading = Reading(
        LabelRule.parse(label), image.lower().removeprefix("."), read_classes(str(classes)) if classes else None
    )
    settings = {"source": "index", **reading.settings}
    try:
        store = tars if out is None else open_store(out, create=True)
        if store.web:
            raise UserError(f"{store.url} takes no files: a web server; give --out, a folder for the manifest")
        jobs = [Job(_place(tars), path, _place(store), shard, reading) for shard, path in enumerate(paths)]
        elsewhere = None if _place(store) == _place(tars) else _place(tars)
        with _alone_in(store):
            whole = _check_output(store, jobs, settings, elsewhere)
            labels = _Labels()
            receipts, read = _index_all(jobs, tars, labels, workers, max_rejected, progress)
            if read or not whole:
                names = reading.classes or labels.classes(jobs)
                _number_all(receipts, jobs, names, workers)
                _write_manifest(store, jobs, receipts, names, settings, elsewhere)
            return _result(store, tars, jobs, receipts, read)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out or tars.url}: {error.strerror}; mend that, or give --out another "
            "folder"
        ) from error


class _Labels:
    """All labels found, each with the first tar that has it; safe to share between threads.

    Receipts hand their names over to it: those of 30,000 tars with 5,000 each would be 16 GB.
    """

    def __init__(self) -> None:
        self._first: dict[int | str, int] = {}
        self._lock = Lock()

    def take(self, job: Job, receipt: Receipt) -> None:
        """Move the names of a receipt here; in its notes stays ``named``, whether its labels are names."""
        names, top = receipt.notes.pop("names"), receipt.notes["top"]
        del receipt.notes["ids"]
        receipt.notes["named"] = names is not None
        if names is None:
            names = [top] if top >= 0 else []
        with self._lock:
            for name in names:
                self._first[name] = min(job.shard, self._first.get(name, job.shard))

    def classes(self, jobs: list[Job]) -> list[str]:
        """Return the names of all classes, as far as they are found in the tars."""
        return name_classes({label: jobs[shard].path for label, shard in self._first.items()})


def _place(store: Store) -> str:
    return str(Path(store.url).resolve()) if store.local else store.url


@contextmanager
def _alone_in(store: Store) -> Iterator[None]:
    """Keep others out of a local data set. On a bucket two at once would do the same work twice, no more."""
    if not isinstance(store, LocalStore):
        yield
        return
    folder = Path(store.url)
    with only_one(folder / "manifest", "index"):
        yield


def _check_output(store: Store, jobs: list[Job], settings: dict, elsewhere: str | None) -> bool:
    """Tell whether a finished index of these tars is there, made with these settings; refuse anything else."""
    remedy = "choose another folder with --out, or remove its manifest first"
    try:
        info = manifest.read_info(store)
    except MissingError:
        return False
    if info.build.get("source") != "index":
        raise UserError(f"{store.url} holds a data set that was built here and needs no index; {remedy}")
    old = manifest.open_table(store, manifest.SHARDS, ["path"])["path"].to_pylist()
    if not set(old) & {job.path for job in jobs}:
        raise UserError(f"{store.url} holds the index of other tars ({old[0]}, ...); {remedy}")
    whole = info.build == settings and info.tars == elsewhere and old == [job.path for job in jobs]
    if not whole:
        _take_apart(store)
    return whole


def _index_all(
    jobs: list[Job], tars: Store, labels: _Labels, workers: int | None, max_rejected: int, progress: bool
) -> tuple[list[Receipt], int]:
    """Read all tars that have no fitting table yet; return the receipts of all, in order, and how many were read."""

    def known(job: Job) -> Receipt | None:
        receipt = finished(job)
        if receipt:
            labels.take(job, receipt)
        return receipt

    with ThreadPoolExecutor(16) as pool:
        receipts = {job.shard: receipt for job, receipt in zip(jobs, pool.map(known, jobs), strict=True) if receipt}
    missing = [job for job in jobs if job.shard not in receipts]
    if workers is None:
        size = sum(tars.size(job.path) for job in missing) if tars.local else len(missing) * _BYTES_A_WORKER
        workers = max(1, min(cores(), size // _BYTES_A_WORKER))
    rejected = [entry for job in jobs if job.shard in receipts for entry in _rejected(job, receipts[job.shard])]
    _stop_at(rejected, receipts.values(), max_rejected, tars.url)
    if missing:
        _take_apart(open_store(jobs[0].out))
    errors = {}
    with ImageProgress("indexing", None, done=sum(each.samples for each in receipts.values()), show=progress) as bar:
        for job, receipt in run_jobs(index_tar, missing, min(workers, len(missing))):
            if isinstance(receipt, str):
                errors[job.shard] = receipt
                continue
            labels.take(job, receipt)
            receipts[job.shard] = receipt
            bar.advance(receipt.samples, receipt.bytes, len(receipt.rejected))
            rejected += _rejected(job, receipt)
            _stop_at(rejected, receipts.values(), max_rejected, tars.url)
    if errors:
        first, *others = (errors[shard] for shard in sorted(errors))
        more = f" (and {len(others)} more bad tars of {len(jobs)}: {' | '.join(others[:4])})" if others else ""
        raise UserError(first + more)
    return [receipts[job.shard] for job in jobs], len(missing)


def _take_apart(store: Store) -> None:
    """Unmark a data set that is about to change."""
    dropped = [name.removesuffix(".parquet") for name in store.list(manifest.EXCLUDE)]
    if dropped and store.exists(manifest.DATASET):
        raise UserError(
            f"{store.url} has drop lists ({', '.join(dropped[:5])}), which count samples by their place and would not "
            "fit a new index; give --out another folder, or remove manifest/exclude"
        )
    store.delete(manifest.DATASET)


def _rejected(job: Job, receipt: Receipt) -> list[tuple[str, str]]:
    return [(f"{job.path} {key}", reason) for key, reason in receipt.rejected]


def _stop_at(rejected: list[tuple[str, str]], receipts: Iterable[Receipt], max_rejected: int, url: str) -> None:
    if len(rejected) > max_rejected:
        remedy = f"leave them out with --max-rejected {len(rejected)}"
        if not any(receipt.samples for receipt in receipts):
            remedy = "not one is whole: look what the tars hold, and where --image and --label say it stands"
        raise too_many(rejected, max_rejected, "sample", url, remedy)


def _number_all(receipts: list[Receipt], jobs: list[Job], names: list[str], workers: int | None) -> None:
    """Number the labels of all tables that hold names, where they are not numbered so already."""
    pending = [
        (job.out, job.shard, names) for job, receipt in zip(jobs, receipts, strict=True) if receipt.notes["named"]
    ]
    workers = min(workers or cores(), len(pending) // 100)  # a table takes milliseconds
    for _ in run_jobs(renumber, pending, workers):
        pass


def _write_manifest(
    store: Store, jobs: list[Job], receipts: list[Receipt], classes: list[str], settings: dict, elsewhere: str | None
) -> None:
    samples = sum(receipt.samples for receipt in receipts)
    if not samples:
        rejected = [entry for job, receipt in zip(jobs, receipts, strict=True) for entry in _rejected(job, receipt)]
        if rejected:
            where, reason = rejected[0]
            raise UserError(f"no sample with a whole image in {jobs[0].tars}: {where} ({reason}), ...; check the tars")
        others = sum((Counter(receipt.notes["skipped"]) for receipt in receipts), Counter())
        only = "no file in" if not others else "only " + ", ".join(f"{n} {kind}" for kind, n in others.items()) + " in"
        raise UserError(f"{only} {jobs[0].tars}, {len(jobs)} tar{'s' * (len(jobs) > 1)}; check where they are from")
    for name in store.list("manifest/samples"):  # of tars that are gone, and of killed runs
        number = re.fullmatch(r"(\d{6,})\.parquet", name)
        if name.endswith(".partial") or (number and int(number[1]) >= len(jobs)):
            store.delete(f"manifest/samples/{name}")
    manifest.write_manifest(store, classes, [job.path for job in jobs], receipts, settings, elsewhere)


def _result(store: Store, tars: Store, jobs: list[Job], receipts: list[Receipt], read: int) -> Indexed:
    info = manifest.read_info(store)
    skipped: Counter[str] = Counter()
    for receipt in receipts:
        skipped.update(receipt.notes["skipped"])
    both = list(zip(jobs, receipts, strict=True))
    return Indexed(
        url=store.url,
        tars=tars.url,
        classes=info.classes,
        samples=info.samples,
        shards=info.shards,
        bytes=info.bytes,
        read=read,
        unlabelled=sum(receipt.notes["unlabelled"] for receipt in receipts),
        rejected=[entry for job, receipt in both for entry in _rejected(job, receipt)],
        skipped=dict(sorted(skipped.items())),
        trailing={job.path: receipt.notes["trailing"] for job, receipt in both if receipt.notes["trailing"]},
    )
