"""Finds the images of a training set that are copies of test images, and lists them to be dropped.

The test sets are hashed into an index (``hashindex.py``); then each training shard is an independent job that streams
its images past the index and writes down what it finds. When all shards are done, by however many runs and machines,
the findings become the drop list, ``pairs.parquet`` and ``report.html``. Memory grows with the test sets alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import hashindex, manifest, phash
from shards.atomic import LOCK, only_one, whole_file, write_text
from shards.dataset import Dataset, Sample
from shards.decode import DECODER, DecodeError
from shards.dedupereport import write_report
from shards.droplist import check_exclude_name, check_takes_lists, read_exclude, write_exclude
from shards.errors import UserError
from shards.hashindex import HashIndex, TestImages
from shards.plan import Slice
from shards.progress import ImageProgress
from shards.store import local_path, open_store
from shards.workers import cores, run_jobs

CHUNK_IMAGES, CHUNK_BYTES = 64, 32 << 20  # images in memory at a time, whichever is less
PART_IMAGES = 8192  # test images that are hashed in one go, 4 kB each

_PLACE = [
    ("shard", pa.int32()),  # of the training set
    ("index", pa.int32()),  # raw, in the shard
    ("key", pa.string()),
]
_TEST_PLACE = [("test_shard", pa.int32()), ("test_index", pa.int32())]
_LIKENESS = [
    ("kind", pa.string()),  # exact: the same bytes; near: the same picture
    ("mirrored", pa.bool_()),
    ("whole", pa.float32()),  # correlation of the small pictures
    ("detail", pa.float32()),  # correlation of their middle frequencies
    ("mismatch", pa.float32()),  # of detail where it is greatest
    ("moved", pa.float32()),  # how far a corner lay from where it belongs, of the side: a crop
]
# What a scan writes down knows a test set by its number, since it may be moved before the results are written.
FINDINGS_SCHEMA = pa.schema([*_PLACE, ("test", pa.int32()), *_TEST_PLACE, *_LIKENESS])
PAIRS_SCHEMA = pa.schema([*_PLACE, ("test", pa.string()), *_TEST_PLACE, ("test_key", pa.string()), *_LIKENESS])
LAYOUT = 2  # of the findings


@dataclass(frozen=True)
class TestSet:
    """What was found of one test set.

    Attributes:
        name: The end of its URL, as in ``pairs.parquet`` and the reasons of the drop list.
        url: Where it is.
        images: Their number.
        undecodable: (key, reason) of images that are only found by their bytes.
        blank: Blank images, which are only found by their bytes too.
        exact: Training images with the bytes of one of its images.
        near: Training images that show the picture of one of its images.
        mirrored: Those of ``near`` that show it mirrored.
        hit: Its images that have a copy in the training set; of several in one test set alike, one counts.
    """

    __test__ = False  # not for pytest

    name: str
    url: str
    images: int
    undecodable: list[tuple[str, str]]
    blank: int
    exact: int
    near: int
    mirrored: int
    hit: int


@dataclass(frozen=True)
class Result:
    """What a run did, and what all runs so far found.

    Attributes:
        url: The training set.
        finished: All shards are scanned, and what follows is whole; if not, it counts what is scanned.
        shards: Of the training set.
        shards_left: Still to scan, by this slice or another.
        images: Training images scanned.
        undecodable: (key, reason) of training images that were only compared by their bytes.
        blank: Blank training images, which were too.
        copies: Training images that are copies of test images.
        dropped: Samples on the drop list: the copies, and what the list it builds on has.
        exclude: Version of the drop list; None if there is none yet.
        report: Path of ``report.html``, None if not finished.
        pairs: Path of ``pairs.parquet``, None if not finished.
        tests: The test sets.
    """

    url: str
    finished: bool
    shards: int
    shards_left: int
    images: int
    undecodable: list[tuple[str, str]]
    blank: int
    copies: int
    dropped: int
    exclude: str | None
    report: str | None
    pairs: str | None
    tests: list[TestSet]


@dataclass(frozen=True)
class _Part:
    """Test images to hash: those from ``start`` to ``stop`` of a shard of the test set number ``test``."""

    url: str
    test: int
    shard: int
    start: int
    stop: int
    out: Path

    @property
    def path(self) -> Path:
        """Where the result goes."""
        return self.out / f"tests/{self.test}-{self.shard:06d}-{self.start:09d}.npz"


@dataclass(frozen=True)
class _Job:
    """A shard of the training set to scan, less what the drop list ``base`` drops."""

    url: str
    base: str | None
    shard: int
    out: Path

    @property
    def name(self) -> str:
        """Where in ``out`` the findings go."""
        return f"findings/{self.shard:06d}.parquet"

    def done(self) -> bool:
        """Tell whether it is scanned, by whomever."""
        return (self.out / self.name).exists()


def dedupe(
    url: str | Path,
    against: Sequence[str | Path],
    *,
    version: str = "dedupe-1",
    base: str | None = None,
    out: str | Path | None = None,
    workers: int | None = None,
    own: Slice = Slice(),  # noqa: B008, it is frozen
    dry_run: bool = False,
    progress: bool = False,
) -> Result:
    """List the training images that are copies of test images; run again, it goes on where it was.

    Args:
        url: The training set.
        against: The test sets.
        version: Name of the new drop list.
        base: An older drop list: its samples are not read, and the new one drops them too.
        out: Local folder for findings, report and index, which all slices share; by default named like the drop list.
        workers: Processes; by default the cores. No influence on what is found.
        own: The shards to scan here. The run that finds all of them scanned, by whomever, writes the results.
        dry_run: Write report and pairs, but no drop list.
        progress: Show progress bars on stderr.

    Raises:
        UserError: A data set or drop list is not there, ``version`` is, or ``out`` belongs to another task.
    """
    check_exclude_name(version)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    out = local_path(out or version, "--out")
    _open.cache_clear()  # it may have changed since the last call
    _open_index.cache_clear()
    raw, kept = _open(str(url)), _open(str(url), base)
    if not dry_run:
        check_takes_lists(raw)
    tests = _open_tests(raw, against)
    jobs = [_Job(str(url), base, shard, out) for shard in range(len(raw.shard_sizes))]
    if not dry_run and not all(job.done() for job in jobs) and _exists(raw, version):
        raise UserError(f"drop list {version} of {raw.url} exists and never changes; choose another --version")
    workers = workers or cores()
    try:
        _claim(out, kept, tests)
        with only_one(out / "tests", "dedupe that reads the same test images", wait=inf, told=True):
            _make_index(out, tests, [str(each) for each in against], workers, progress)
        with _alone_in(out, own):
            _scan([job for job in jobs if own.has(job.shard)], kept, workers, progress)
        with only_one(out, "dedupe", wait=inf):  # the last two slices may end together
            return _finish(jobs, raw, tests, None if dry_run else version, base)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror or error}; mend that and run the same command "
            "again, it keeps what is finished"
        ) from error


@contextmanager
def _alone_in(out: Path, own: Slice) -> Iterator[None]:
    """Let slices scan side by side, but no slice twice at once."""
    name = f"{own.index}-of-{own.count}"
    with (
        only_one(out / "findings", "dedupe", shared=own.count > 1),
        only_one(out / "slices" / name, f"dedupe of slice {own.index}/{own.count}"),
    ):
        yield


def _open_tests(train: Dataset, against: Sequence[str | Path]) -> list[Dataset]:
    if not against:
        raise UserError("no test set to look for; name each with --against URL")
    tests = [_open(str(each)) for each in against]
    seen = {train.digest: "the training set itself"}
    for test in tests:
        if test.digest in seen:
            raise UserError(f"--against {test.url} has the images of {seen[test.digest]}; name each data set once")
        seen[test.digest] = f"--against {test.url}"
    return tests


def _names(urls: list[str]) -> list[str]:
    """Return short names: the last two parts of each URL, numbered where that is not enough."""
    names = ["/".join(url.rstrip("/").split("/")[-2:]).lstrip("/") for url in urls]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _exists(dataset: Dataset, version: str) -> bool:
    return dataset.store.exists(manifest.exclude_path(version))


def _claim(out: Path, train: Dataset, tests: list[Dataset]) -> None:
    """Write down what ``out`` is for, or check that it is for this."""
    plan = {
        "layout": LAYOUT,
        "train": train.digest,
        "tests": [test.digest for test in tests],
        "decoder": DECODER,
        "thresholds": phash.THRESHOLDS | {"test images compared, at most": hashindex.MOST_COMPARED},
    }
    path = out / "plan.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    with only_one(out, "dedupe", wait=inf):  # slices may start together
        if path.exists():
            try:
                old = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is damaged; remove {out} or choose another --out") from error
            if old != plan:
                other = ", ".join(name for name in plan if old.get(name) != plan[name])
                raise UserError(f"{out} holds another dedupe ({other} differ); choose another --out or remove it")
        elif any(entry.name not in (LOCK, ".plan.json.partial") for entry in out.iterdir()):
            raise UserError(f"{out} holds something else; choose another --out")
        else:
            write_text(path, json.dumps(plan, indent=1) + "\n")


def _make_index(out: Path, tests: list[Dataset], urls: list[str], workers: int, progress: bool) -> None:
    """Hash all test images, unless that is done; each part is kept until the index is whole."""
    if (out / "index").exists():
        return
    parts = [
        _Part(urls[test], test, shard, start, min(start + PART_IMAGES, size), out)
        for test, dataset in enumerate(tests)
        for shard, size in enumerate(dataset.shard_sizes.tolist())
        for start in range(0, size, PART_IMAGES)
    ]
    todo = [part for part in parts if not part.path.exists()]
    images, left = sum(map(len, tests)), sum(part.stop - part.start for part in todo)
    with ImageProgress("hashing test images", images, images - left, "undecodable", progress) as bar:
        for _, (count, size, undecodable) in run_jobs(_hash_part, todo, min(workers, max(len(todo), 1))):
            bar.advance(count, size, undecodable)
    about = [{"images": len(test), "undecodable": [], "blank": 0} for test in tests]

    def hashed() -> Iterator[TestImages]:
        for part in parts:
            with np.load(part.path) as arrays:
                said = json.loads(str(arrays["about"]))
                about[part.test]["undecodable"] += said["undecodable"]
                about[part.test]["blank"] += said["blank"]
                yield TestImages(arrays["where"], arrays["sha256"], arrays["pictures"])

    hashindex.write_index(out / "index", hashed(), images, about)
    for part in parts:
        part.path.unlink()


def _hash_part(part: _Part) -> tuple[int, int, int]:
    """Hash some images of a test shard; return images, bytes and how many cannot be decoded."""
    dataset, count = _open(part.url), part.stop - part.start
    pictures = np.zeros((count, phash.SIDE, phash.SIDE), np.uint8)
    digests, undecodable = [], []
    for start, samples in _chunks(dataset, part.shard, part.start, part.stop):
        for place, sample in enumerate(samples, start - part.start):
            digests.append(hashlib.sha256(sample.image).digest())
            try:
                pictures[place] = phash.small_picture(sample.image, sample.key)
            except DecodeError as error:
                undecodable.append((sample.key, _reason(error, sample.key)))
    blank = int(phash.blank(pictures).sum()) - len(undecodable)
    indices = np.arange(part.start, part.stop)
    where = np.stack([np.full(count, part.test), np.full(count, part.shard), indices], axis=1)
    sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    about = json.dumps({"undecodable": undecodable, "blank": blank})
    with whole_file(part.path) as partial, open(partial, "wb") as file:
        np.savez(file, where=where.astype(np.int32), sha256=sha256, pictures=pictures, about=np.array(about))
    return count, int(dataset.rows(part.shard).size[part.start : part.stop].sum()), len(undecodable)


def _scan(mine: list[_Job], dataset: Dataset, workers: int, progress: bool) -> None:
    todo = [job for job in mine if not job.done()]
    images, left = (int(sum(dataset.shard_sizes[job.shard] for job in jobs)) for jobs in (mine, todo))
    with ImageProgress("scanning", images, images - left, "undecodable", progress) as bar:
        for _, (count, size, undecodable) in run_jobs(_scan_shard, todo, min(workers, max(len(todo), 1))):
            bar.advance(count, size, undecodable)


def _scan_shard(job: _Job) -> tuple[int, int, int]:
    """Look up all images of a training shard; return images, bytes and how many cannot be decoded."""
    dataset, index = _open(job.url, job.base), _open_index(job.out / "index")
    raw = dataset.raw_indices(job.shard).tolist()
    rows: dict[str, list] = {name: [] for name in FINDINGS_SCHEMA.names}
    undecodable, blank = [], 0
    count = int(dataset.shard_sizes[job.shard])
    for start, samples in _chunks(dataset, job.shard, 0, count):
        matches = [_exact(index, sample) for sample in samples]  # by test set
        pictures, whose = [], []
        for i, sample in enumerate(samples):
            try:
                pictures.append(phash.small_picture(sample.image, sample.key))
                whose.append(i)
            except DecodeError as error:
                undecodable.append((sample.key, _reason(error, sample.key)))
        if pictures:
            found, more_blank = index.near(np.stack(pictures), [matches[i] for i in whose])
            blank += more_blank
            for i, near in zip(whose, found, strict=True):
                matches[i] |= {int(index.where[match.row, 0]): match for match in near}
        for i, sample in enumerate(samples):
            for test in sorted(matches[i]):
                _add(rows, (job.shard, raw[start + i], sample.key), matches[i][test], index)
    about = {"images": count, "undecodable": undecodable, "blank": blank}
    schema = FINDINGS_SCHEMA.with_metadata({"about": json.dumps(about)})
    manifest.write_table(open_store(job.out), job.name, pa.table(rows, schema=schema))
    return count, int(dataset.rows(job.shard).size.sum()), len(undecodable)


def _exact(index: HashIndex, sample: Sample) -> dict[int, hashindex.Found]:
    found = index.exact(hashlib.sha256(sample.image).digest())
    return {test: hashindex.Found(row, False, None) for test, row in found.items()}


def _reason(error: DecodeError, key: str) -> str:
    """Return what is wrong with an image: the error without the key and the advice, for a list of them."""
    return str(error).removeprefix(f"cannot decode {key}: ").rpartition(";")[0]


def _add(rows: dict[str, list], place: tuple[int, int, str], match: hashindex.Found, index: HashIndex) -> None:
    likeness = match.likeness or phash.Likeness(1.0, 1.0, 0.0, 0.0)
    kind = "near" if match.likeness else "exact"
    values = (*place, *index.where[match.row].tolist(), kind, match.mirrored)
    row = dict(zip(FINDINGS_SCHEMA.names, values, strict=False)) | likeness._asdict()
    for name, value in row.items():
        rows[name].append(value)


def _chunks(dataset: Dataset, shard: int, start: int, stop: int) -> Iterator[tuple[int, list[Sample]]]:
    """Yield the samples of a shard from ``start`` to ``stop``, some at a time, with the index of the first."""
    sizes = dataset.rows(shard).size[:stop]
    while start < stop:
        upto = np.cumsum(sizes[start : start + CHUNK_IMAGES])
        end = start + max(1, int(np.searchsorted(upto, CHUNK_BYTES, side="right")))
        yield start, dataset.read_many(shard, start, end)
        start = end


@lru_cache(maxsize=64)
def _open(url: str, exclude: str | None = None) -> Dataset:
    return Dataset.open(url, exclude, cached_shards=1)  # each is gone through once: more would only fill memory


@lru_cache(maxsize=1)
def _open_index(folder: Path) -> HashIndex:
    return HashIndex(folder)


def _finish(jobs: list[_Job], raw: Dataset, tests: list[Dataset], version: str | None, base: str | None) -> Result:
    """Count what is found; once every shard is scanned, write the drop list and what explains it."""
    out = jobs[0].out
    store, remedy = open_store(out), "remove it and run the same command again"
    done = [manifest.open_table(store, job.name, FINDINGS_SCHEMA.names, remedy) for job in jobs if job.done()]
    scans = [json.loads(table.schema.metadata[b"about"]) for table in done]
    findings = pa.concat_tables([table.replace_schema_metadata() for table in done] or [FINDINGS_SCHEMA.empty_table()])
    finished = len(done) == len(jobs)
    names = _names([test.url for test in tests])
    pairs = _pairs(findings, tests, names)
    drop = _drop_list(pairs, raw, base)
    result = Result(
        url=raw.url,
        finished=finished,
        shards=len(jobs),
        shards_left=len(jobs) - len(done),
        images=sum(scan["images"] for scan in scans),
        undecodable=[tuple(entry) for scan in scans for entry in scan["undecodable"]],
        blank=sum(scan["blank"] for scan in scans),
        copies=len(set(zip(pairs["shard"].to_pylist(), pairs["index"].to_pylist(), strict=True))),
        dropped=len(drop),
        exclude=version if finished else None,
        report=str(out / "report.html") if finished else None,
        pairs=str(out / "pairs.parquet") if finished else None,
        tests=_test_sets(pairs, tests, names, hashindex.about(out / "index")),
    )
    if finished:
        manifest.write_table(store, "pairs.parquet", pairs)
        if version:
            _write_drop_list(raw, version, drop)
        write_report(out / "report.html", result, pairs, raw, tests, base)
    return result


def _pairs(findings: pa.Table, tests: list[Dataset], names: list[str]) -> pa.Table:
    """Return the findings as they are to be read: with the names of test sets and the keys of test images."""
    test, shard, index = (findings[name].to_numpy() for name in ("test", "test_shard", "test_index"))
    keys = np.empty(len(findings), object)
    for one, its_shard in np.unique(np.stack([test, shard], axis=1), axis=0).tolist():
        here = np.flatnonzero((test == one) & (shard == its_shard))
        keys[here] = tests[one].table(its_shard, ["key"])["key"].take(index[here]).to_pylist()
    columns = {name: findings[name] for name in findings.column_names}
    columns |= {"test": [names[each] for each in test.tolist()], "test_key": keys.tolist()}
    return pa.table([columns[name] for name in PAIRS_SCHEMA.names], schema=PAIRS_SCHEMA)


def _drop_list(pairs: pa.Table, raw: Dataset, base: str | None) -> list[tuple[int, int, str]]:
    """Return (shard, raw index, reason) of the copies and of what the older list drops, whose reasons stay."""
    rows: dict[tuple[int, int], str] = {}
    for pair in pairs.select(["shard", "index", "kind", "mirrored", "test_key", "test"]).to_pylist():
        how = f"{pair['kind']}, mirrored" if pair["mirrored"] else pair["kind"]
        rows.setdefault((pair["shard"], pair["index"]), f"copy ({how}) of {pair['test_key']} in {pair['test']}")
    if base:
        rows.update({(shard, index): reason for shard, index, reason in read_exclude(raw.url, base)})
    return [(*place, rows[place]) for place in sorted(rows)]


def _write_drop_list(raw: Dataset, version: str, drop: list[tuple[int, int, str]]) -> None:
    """Write the drop list; the same one may be there already, from a run that was asked for again."""
    if not _exists(raw, version):
        write_exclude(raw.url, version, drop)
        return
    if [place for *place, _ in read_exclude(raw.url, version)] != [place for *place, _ in drop]:
        raise UserError(f"drop list {version} of {raw.url} exists, drops other samples, and never changes; "
                        "choose another --version with the same --out")  # fmt: skip


def _test_sets(pairs: pa.Table, tests: list[Dataset], names: list[str], about: list[dict]) -> list[TestSet]:
    rows = pairs.select(["test", "kind", "mirrored", "test_shard", "test_index"]).to_pylist()
    kinds = Counter((row["test"], row["kind"]) for row in rows)
    mirrored = Counter(row["test"] for row in rows if row["mirrored"])
    hit = {(row["test"], row["test_shard"], row["test_index"]) for row in rows}
    hits = Counter(test for test, *_ in hit)
    return [
        TestSet(
            name=name,
            url=dataset.url,
            images=said["images"],
            undecodable=[tuple(entry) for entry in said["undecodable"]],
            blank=said["blank"],
            exact=kinds[name, "exact"],
            near=kinds[name, "near"],
            mirrored=mirrored[name],
            hit=hits[name],
        )
        for name, dataset, said in zip(names, tests, about, strict=True)
    ]
