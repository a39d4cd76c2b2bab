"""Finds the images of a training set that are copies of test images, and lists them to be dropped.

The test sets are hashed into an index (``hashindex.py``); then each training shard is an independent job that streams
its images past the index and writes down what it finds. When all shards are done, by however many runs and machines,
the findings become the drop list, ``pairs.parquet`` and ``report.html``. Memory grows with the test sets alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import hashindex, manifest, phash
from shards.atomic import only_one, whole_file, write_text
from shards.dataset import Dataset, Sample, check_exclude_name, check_takes_lists, write_exclude
from shards.decode import DECODER, DecodeError
from shards.dedupereport import write_report
from shards.errors import UserError
from shards.hashindex import HashIndex, TestImages
from shards.plan import Slice
from shards.progress import ImageProgress
from shards.store import open_store
from shards.workers import cores, run_jobs

CHUNK_IMAGES, CHUNK_BYTES = 64, 32 << 20  # training images in memory at a time, whichever is less

FINDINGS_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),  # of the training set
        ("index", pa.int32()),  # raw, in the shard
        ("key", pa.string()),
        ("test", pa.string()),  # name of the test set
        ("test_shard", pa.int32()),
        ("test_index", pa.int32()),
        ("test_key", pa.string()),
        ("kind", pa.string()),  # exact: the same bytes; near: the same picture
        ("mirrored", pa.bool_()),
        ("whole", pa.float32()),  # correlation of the small pictures
        ("detail", pa.float32()),  # correlation of their middle frequencies
        ("mismatch", pa.float32()),  # of detail where it is greatest
        ("moved", pa.float32()),  # how far a corner lay from where it belongs, of the side: a crop
    ]
)


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
class _Job:
    """One shard to go through, of the training set or of the test set number ``test``."""

    url: str
    shard: int
    out: Path
    tests: tuple[tuple[str, str], ...] = ()  # name and URL of each
    test: int = -1

    @property
    def path(self) -> str:
        """Where in ``out`` the result goes."""
        return f"tests/{self.test}-{self.shard:06d}.npz" if self.test >= 0 else f"findings/{self.shard:06d}.parquet"


def dedupe(
    url: str | Path,
    against: list[str | Path],
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
        base: An older drop list; the new one drops its samples too.
        out: Local folder for findings, report and index, which all slices share; by default named like the drop list.
        workers: Processes; by default the cores. No influence on what is found.
        own: The shards to scan here. The run that finds all of them scanned, by whomever, writes the results.
        dry_run: Write report and pairs, but no drop list.
        progress: Show progress bars on stderr.

    Raises:
        UserError: A data set or drop list is not there, ``version`` is, or ``out`` belongs to another task.
    """
    check_exclude_name(version)
    Dataset.open(url, base)  # says so if there is no such list
    raw = Dataset.open(url)
    if not dry_run:
        check_takes_lists(raw)
    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: must be at least 1")
    tests = _open_tests(raw, against)
    out = Path(out) if out else Path(version)
    names = tuple(zip(_names([each.url for each in tests]), [each.url for each in tests], strict=True))
    jobs = [_Job(raw.url, shard, out, names) for shard in range(len(raw.shard_sizes))]
    if not dry_run and any(not (out / job.path).exists() for job in jobs) and _exists(raw, version):
        raise UserError(f"drop list {version} of {raw.url} exists and never changes; choose another --version")
    _claim(out, raw, tests)
    workers = workers or cores()
    with only_one(out / "tests", "dedupe that reads the same test images", wait=inf):
        _make_index(out, tests, names, workers, progress)
    with only_one(out / "findings", "dedupe", shared=own.count > 1):
        mine = [job for job in jobs if own.has(job.shard)]
        _scan([job for job in mine if not (out / job.path).exists()], raw, mine, workers, progress)
    with only_one(out, "dedupe", wait=inf):  # the last two slices may end together
        return _finish(jobs, raw, tests, None if dry_run else version, base)


def _open_tests(train: Dataset, against: list[str | Path]) -> list[Dataset]:
    if not against:
        raise UserError("no test set to look for; name each with --against URL")
    tests = [Dataset.open(each) for each in against]
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
        "train": train.digest,
        "tests": [test.digest for test in tests],
        "decoder": DECODER,
        "thresholds": phash.THRESHOLDS | {"test images compared, at most": hashindex.MOST_COMPARED},
    }
    path = out / "plan.json"
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged; remove {out} or choose another --out") from error
        if old != plan:
            other = ", ".join(name for name in plan if old.get(name) != plan[name])
            raise UserError(f"{out} holds another dedupe ({other} differ); choose another --out or remove it")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} holds something else; choose another --out")
    else:
        write_text(path, json.dumps(plan, indent=1) + "\n")


def _make_index(
    out: Path, tests: list[Dataset], names: tuple[tuple[str, str], ...], workers: int, progress: bool
) -> None:
    """Hash all test images, unless that is done; each shard's part is kept until the index is whole."""
    if (out / "index").exists():
        return
    jobs = [
        _Job(url, shard, out, names, test)
        for test, (_, url) in enumerate(names)
        for shard in range(len(tests[test].shard_sizes))
    ]
    todo = [job for job in jobs if not (out / job.path).exists()]
    images = sum(map(len, tests))
    left = sum(int(tests[job.test].shard_sizes[job.shard]) for job in todo)
    with ImageProgress("hashing test images", images, images - left, "undecodable", progress) as bar:
        for _, (count, size, undecodable) in run_jobs(_hash_shard, todo, min(workers, max(len(todo), 1))):
            bar.advance(count, size, undecodable)
    about = [{"images": len(test), "undecodable": [], "blank": 0} for test in tests]

    def parts() -> Iterator[TestImages]:
        for job in jobs:
            with np.load(out / job.path) as part:
                said = json.loads(str(part["about"]))
                about[job.test]["undecodable"] += said["undecodable"]
                about[job.test]["blank"] += said["blank"]
                yield TestImages(part["where"], part["sha256"], part["pictures"])

    hashindex.write_index(out / "index", parts(), images, about)
    for job in jobs:
        (out / job.path).unlink()


def _hash_shard(job: _Job) -> tuple[int, int, int]:
    """Hash the images of a test shard; return images, bytes and how many cannot be decoded."""
    dataset = _open(job.url)
    count = int(dataset.shard_sizes[job.shard])
    pictures = np.zeros((count, phash.SIDE, phash.SIDE), np.uint8)
    digests, undecodable = [], []
    for start, samples in _chunks(dataset, job.shard):
        for index, sample in enumerate(samples, start):
            digests.append(hashlib.sha256(sample.image).digest())
            try:
                pictures[index] = phash.small_picture(sample.image, sample.key)
            except DecodeError as error:
                undecodable.append((sample.key, _reason(error, sample.key)))
    blank = int(phash.blank(pictures).sum()) - len(undecodable)
    where = np.stack([np.full(count, job.test), np.full(count, job.shard), np.arange(count)], axis=1)
    sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    about = json.dumps({"undecodable": undecodable, "blank": blank})
    with whole_file(job.out / job.path) as partial, open(partial, "wb") as file:
        np.savez(file, where=where.astype(np.int32), sha256=sha256, pictures=pictures, about=np.array(about))
    return count, int(dataset.rows(job.shard).size.sum()), len(undecodable)


def _scan(todo: list[_Job], dataset: Dataset, mine: list[_Job], workers: int, progress: bool) -> None:
    images, left = (int(sum(dataset.shard_sizes[job.shard] for job in jobs)) for jobs in (mine, todo))
    with ImageProgress("scanning", images, images - left, "undecodable", progress) as bar:
        for _, (count, size, undecodable) in run_jobs(_scan_shard, todo, min(workers, max(len(todo), 1))):
            bar.advance(count, size, undecodable)


def _scan_shard(job: _Job) -> tuple[int, int, int]:
    """Look up all images of a training shard; return images, bytes and how many cannot be decoded."""
    dataset, index = _open(job.url), _open_index(job.out / "index")
    rows: dict[str, list] = {name: [] for name in FINDINGS_SCHEMA.names}
    undecodable, blank = [], 0
    for start, samples in _chunks(dataset, job.shard):
        pictures, whose = [], []
        near: list[list[hashindex.Found]] = [[] for _ in samples]
        for i, sample in enumerate(samples):
            try:
                pictures.append(phash.small_picture(sample.image, sample.key))
                whose.append(i)
            except DecodeError as error:
                undecodable.append((sample.key, _reason(error, sample.key)))
        if pictures:
            found, more_blank = index.near(np.stack(pictures))
            blank += more_blank
            for i, matches in zip(whose, found, strict=True):
                near[i] = matches
        for i, sample in enumerate(samples):
            for match in _one_a_test(index, sample, near[i]):
                _add(rows, job, start + i, sample.key, match, index)
    about = {"images": int(dataset.shard_sizes[job.shard]), "undecodable": undecodable, "blank": blank}
    schema = FINDINGS_SCHEMA.with_metadata({"about": json.dumps(about)})
    manifest.write_table(open_store(job.out), job.path, pa.table(rows, schema=schema))
    return about["images"], int(dataset.rows(job.shard).size.sum()), len(undecodable)


def _reason(error: DecodeError, key: str) -> str:
    """Return what is wrong with an image: the error without the key and the advice, for a list of them."""
    return str(error).removeprefix(f"cannot decode {key}: ").rpartition(";")[0]


def _one_a_test(index: HashIndex, sample: Sample, near: list[hashindex.Found]) -> list[hashindex.Found]:
    """Return at most one match in each test set: the same bytes if there are, else the same picture."""
    matches = {int(index.where[match.row, 0]): match for match in near}
    for row in reversed(index.exact(hashlib.sha256(sample.image).digest())):  # the first one stays
        matches[int(index.where[row, 0])] = hashindex.Found(row, False, None)
    return [matches[test] for test in sorted(matches)]


def _add(rows: dict[str, list], job: _Job, at: int, key: str, match: hashindex.Found, index: HashIndex) -> None:
    test, test_shard, test_index = index.where[match.row].tolist()
    name, url = job.tests[test]
    likeness = match.likeness or phash.Likeness(1.0, 1.0, 0.0, 0.0)
    row = {
        "shard": job.shard, "index": at, "key": key, "test": name, "test_shard": test_shard, "test_index": test_index,
        "test_key": _open(url).rows(test_shard).keys[test_index].as_py(),
        "kind": "near" if match.likeness else "exact", "mirrored": match.mirrored, **likeness._asdict(),
    }  # fmt: skip
    for name, value in row.items():
        rows[name].append(value)


def _chunks(dataset: Dataset, shard: int) -> Iterator[tuple[int, list[Sample]]]:
    """Yield the samples of a shard, some at a time, with the index of the first."""
    sizes = dataset.rows(shard).size
    start = 0
    while start < len(sizes):
        upto = np.cumsum(sizes[start : start + CHUNK_IMAGES])
        stop = start + max(1, int(np.searchsorted(upto, CHUNK_BYTES, side="right")))
        yield start, dataset.read_many(shard, start, stop)
        start = stop


@lru_cache(maxsize=64)
def _open(url: str) -> Dataset:
    return Dataset.open(url)


@lru_cache(maxsize=1)
def _open_index(folder: Path) -> HashIndex:
    return HashIndex(folder)


def _finish(jobs: list[_Job], raw: Dataset, tests: list[Dataset], version: str | None, base: str | None) -> Result:
    """Count what is found; once every shard is scanned, write the drop list and what explains it."""
    out = jobs[0].out
    done = [pq.read_table(out / job.path) for job in jobs if (out / job.path).exists()]
    scans = [json.loads(table.schema.metadata[b"about"]) for table in done]
    pairs = pa.concat_tables([table.replace_schema_metadata() for table in done] or [FINDINGS_SCHEMA.empty_table()])
    finished = len(done) == len(jobs)
    drop = _drop_list(pairs, raw, base)
    copies = len(set(zip(pairs["shard"].to_pylist(), pairs["index"].to_pylist(), strict=True)))
    result = Result(
        url=raw.url,
        finished=finished,
        shards=len(jobs),
        shards_left=len(jobs) - len(done),
        images=sum(scan["images"] for scan in scans),
        undecodable=[tuple(entry) for scan in scans for entry in scan["undecodable"]],
        blank=sum(scan["blank"] for scan in scans),
        copies=copies,
        dropped=len(drop),
        exclude=version if finished else None,
        report=str(out / "report.html") if finished else None,
        pairs=str(out / "pairs.parquet") if finished else None,
        tests=_test_sets(pairs, jobs[0].tests, hashindex.about(out / "index")),
    )
    if finished:
        manifest.write_table(open_store(out), "pairs.parquet", pairs)
        write_report(out / "report.html", result, pairs, raw, tests, base)
        if version:
            _write_drop_list(raw, version, drop)
    return result


def _drop_list(pairs: pa.Table, raw: Dataset, base: str | None) -> list[tuple[int, int, str]]:
    """Return (shard, raw index, reason) of the copies and of what the older list drops, whose reasons stay."""
    rows = {}
    for pair in pairs.select(["shard", "index", "kind", "mirrored", "test_key", "test"]).to_pylist():
        how = f"{pair['kind']}, mirrored" if pair["mirrored"] else pair["kind"]
        rows.setdefault((pair["shard"], pair["index"]), f"copy ({how}) of {pair['test_key']} in {pair['test']}")
    if base:
        old = manifest.read_table(raw.store.read(manifest.exclude_path(base)))
        rows.update({(row["shard"], row["index"]): row["reason"] for row in old.to_pylist()})
    return [(*place, rows[place]) for place in sorted(rows)]


def _write_drop_list(raw: Dataset, version: str, drop: list[tuple[int, int, str]]) -> None:
    """Write the drop list; the same one may be there already, from a run that was asked for again."""
    if not _exists(raw, version):
        write_exclude(raw.url, version, drop)
        return
    there = manifest.read_table(raw.store.read(manifest.exclude_path(version))).to_pylist()
    if [(row["shard"], row["index"], row["reason"]) for row in there] != drop:
        raise UserError(f"drop list {version} of {raw.url} exists, drops other samples, and never changes; "
                        "choose another --version with the same --out")  # fmt: skip


def _test_sets(pairs: pa.Table, names: tuple[tuple[str, str], ...], about: list[dict]) -> list[TestSet]:
    rows = pairs.select(["test", "kind", "mirrored", "test_shard", "test_index"]).to_pylist()
    kinds = Counter((row["test"], row["kind"]) for row in rows)
    mirrored = Counter(row["test"] for row in rows if row["mirrored"])
    hit = {(row["test"], row["test_shard"], row["test_index"]) for row in rows}
    hits = Counter(test for test, *_ in hit)
    return [
        TestSet(
            name=name,
            url=url,
            images=said["images"],
            undecodable=[tuple(entry) for entry in said["undecodable"]],
            blank=said["blank"],
            exact=kinds[name, "exact"],
            near=kinds[name, "near"],
            mirrored=mirrored[name],
            hit=hits[name],
        )
        for (name, url), said in zip(names, about, strict=True)
    ]
