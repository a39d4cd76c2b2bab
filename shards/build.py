"""A folder of images into a data set: plan all shards, write each on its own, then the manifest.

Which image goes into which shard is settled before anything is written, by hashes of the keys. So a shard is
an independent job, any number of workers writes the same bytes, and a killed build goes on where it was.
"""

import hashlib
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards import manifest
from shards.atomic import only_one
from shards.errors import PatchmillError, UserError
from shards.manifest import Info, Receipt
from shards.shard import Job, finished, write_shard
from shards.sources.folder import ImageFile, scan

WHOLE = "all"  # the name of the only part of a build without a split


@dataclass(frozen=True)
class Part:
    """One data set that a build made: ``bytes`` are those of its tars, ``rejected`` holds (file, reason)."""

    url: str
    samples: int
    shards: int
    bytes: int
    rejected: list[tuple[str, str]]


@dataclass(frozen=True)
class Result:
    """What a build made: parts by name (``all`` without a split), other files left out by extension."""

    classes: list[str]
    others: dict[str, int]
    parts: dict[str, Part]


@dataclass(frozen=True)
class _Plan:
    """All that decides the bytes of one part."""

    folder: Path
    classes: list[str]
    jobs: list[Job]
    build: dict


def build(
    source: str | Path,
    out: str | Path,
    *,
    shard_samples: int = 10_000,
    shard_bytes: int = 1_000_000_000,
    workers: int | None = None,
    split: dict[str, float] | None = None,
    seed: int = 0,
    max_rejected: int = 0,
    progress: bool = False,
) -> Result:
    """Build a data set from a folder of images, one folder a class; run again, it goes on where it was.

    Args:
        source: The folder ``SOURCE/CLASS/.../name.jpg``; original bytes are kept.
        out: The local folder to make. With a split, each part is a data set of its own in it.
        shard_samples: At most so many samples a shard.
        shard_bytes: At most so many bytes of images a shard (but one image at least).
        workers: Processes; by default one for each core this process may use, as far as starting them pays.
            No influence on the bytes.
        split: Share of each part beside ``train``, as in ``{"val": 0.1}``. A hash of its key puts an image
            into its part, so that adding images moves none.
        seed: Of the global shuffle.
        max_rejected: So many broken images are left out, and listed in the receipts; one more is an error.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: The source, a setting or an image is bad, or ``out`` holds something else. There is no new
            data set then, but the whole shards stay for the next try.
    """
    source, out, split = Path(source), Path(out), split or {}
    _at_least("shard-samples", shard_samples, 1)
    _at_least("shard-bytes", shard_bytes, 1)
    _at_least("workers", 1 if workers is None else workers, 1)
    _at_least("max-rejected", max_rejected, 0)
    _check_split(split)
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"output {out} lies in the source {source}; choose a folder outside")
    if out.exists() and not out.is_dir():
        raise UserError(f"output {out} is a file; choose a folder")

    found = scan(source)
    settings = {"source": "folder", "seed": seed, "shard_samples": shard_samples, "shard_bytes": shard_bytes}
    plans = {}
    for name, images in _parts(found.images, split).items():
        folder = out / name if split else out
        images.sort(key=lambda image: (_hash(f"{seed}:{image.key}"), image.key))
        shards = enumerate(_cut(images, shard_samples, shard_bytes))
        jobs = [Job(source, folder, shard, images) for shard, images in shards]
        plan = _hash("".join(job.plan() for job in jobs))
        plans[name] = _Plan(folder, found.classes, jobs, settings | {"split": split, "part": name, "plan": plan})
    _check_output(out, plans)

    jobs = [job for plan in plans.values() for job in plan.jobs]
    try:
        with only_one(out, "build"):
            for plan in plans.values():
                _clear(plan)
            receipts = _write_all(jobs, workers or _useful_workers(len(found.images)), progress)
            rejected = [entry for receipt in receipts.values() for entry in receipt.rejected]
            if len(rejected) > max_rejected:
                raise UserError(_broken(source, rejected, max_rejected))
            parts = {name: _finish(plan, [receipts[job.tar] for job in plan.jobs]) for name, plan in plans.items()}
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror}; mend that and run the same "
            "command again, it keeps what is finished"
        ) from error
    return Result(found.classes, found.others, parts)


def parse_split(text: str) -> dict[str, float]:
    """Parse ``val=0.1`` or ``val=0.1,test=0.05``.

    Raises:
        UserError: It is not of that form.
    """
    try:
        pairs = [(name, float(share)) for name, share in (item.split("=") for item in text.split(","))]
    except ValueError as error:
        raise UserError(f"--split {text}: write name=share, as in val=0.1 or val=0.1,test=0.05") from error
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"--split {text}: a name comes twice; give each part once")
    _check_split(dict(pairs))
    return dict(pairs)


def _check_split(split: dict[str, float]) -> None:
    for name, share in split.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "train":
            raise UserError(f"--split {name}={share}: name the part with letters and digits; train is the rest")
        if not 0 < share < 1:
            raise UserError(f"--split {name}={share}: the share must lie between 0 and 1")
    if sum(split.values()) >= 1:
        raise UserError(f"--split shares add up to {sum(split.values()):g}; leave something for train")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{name} {value}: must be at least {least}")


def _useful_workers(images: int) -> int:
    """Return how many processes pay: one writes thousands of images while another starts."""
    return max(1, min(len(os.sched_getaffinity(0)), images // 10_000))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(images: list[ImageFile], split: dict[str, float]) -> dict[str, list[ImageFile]]:
    """Deal the images to the parts. Neither seed nor other images have a say in where one goes."""
    if not split:
        return {WHOLE: images}
    parts = {name: [] for name in ("train", *split)}
    for image in images:
        place = int(_hash(f"split:{image.key}")[:13], 16) / 16**13  # 52 bits: exact in a float
        name = "train"
        for candidate, share in split.items():
            if place < share:
                name = candidate
                break
            place -= share
        parts[name].append(image)
    for name, members in parts.items():
        if not members:
            raise UserError(f"--split leaves no image for {name} out of {len(images)}; choose other shares")
    return parts


def _cut(images: list[ImageFile], shard_samples: int, shard_bytes: int) -> Iterator[list[ImageFile]]:
    shard, size = [], 0
    for image in images:
        if shard and (len(shard) == shard_samples or size + image.size > shard_bytes):
            yield shard
            shard, size = [], 0
        shard.append(image)
        size += image.size
    yield shard


def _check_output(out: Path, plans: dict[str, _Plan]) -> None:
    """Refuse to write over anything but an earlier try of the same build."""
    remedy = "choose another folder, or remove it first"
    folders = {plan.folder for plan in plans.values()}
    for path in [out / manifest.DATASET, *out.glob(f"*/{manifest.DATASET}")]:
        if path.exists() and path.parents[1] not in folders:
            raise UserError(f"output {out} already holds another data set, {path.parents[1]}; {remedy}")
    for plan in plans.values():
        if (plan.folder / manifest.DATASET).exists():
            info = manifest.parse_info((plan.folder / manifest.DATASET).read_bytes(), str(plan.folder))
            old, new = (
                build | {"classes": classes}
                for build, classes in [(info.build, info.classes), (plan.build, plan.classes)]
            )
            other = [name for name in new if old.get(name) != new[name]]
            if other:
                what = ", ".join("images" if name == "plan" else name for name in other)
                raise UserError(f"output {plan.folder} already holds another data set ({what} differ); {remedy}")
        elif (plan.folder / "shards").exists() and not (plan.folder / "manifest/samples").exists():
            raise UserError(f"output {plan.folder} holds shards that no build of ours began; {remedy}")


def _clear(plan: _Plan) -> None:
    """Remove what other tries left behind: partial files, and shards that the plan does not have."""
    (plan.folder / "manifest/samples").mkdir(parents=True, exist_ok=True)  # the mark that a build began here
    (plan.folder / "shards").mkdir(exist_ok=True)
    planned = {path for job in plan.jobs for path in (job.tar, job.samples)}
    for folder in ("shards", "manifest", "manifest/samples"):
        for path in (plan.folder / folder).iterdir():
            ours = re.fullmatch(r"\d{6,}\.(tar|parquet)", path.name) and path not in planned
            if ours or re.fullmatch(r"\..*\.partial", path.name):
                path.unlink()


def _write_all(jobs: list[Job], workers: int, progress: bool) -> dict[Path, Receipt]:
    """Write the shards that are not finished yet; return the receipts of all by tar."""
    receipts = {job.tar: receipt for job in jobs if (receipt := finished(job))}
    missing = [job for job in jobs if job.tar not in receipts]
    for job in missing:  # what follows takes its whole data set apart: unmark it
        (job.folder / manifest.DATASET).unlink(missing_ok=True)
    bar = Progress(
        TextColumn("building shards"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )
    with bar:
        there = sum(len(job.images) for job in jobs if job.tar in receipts)
        task = bar.add_task("", total=sum(len(job.images) for job in jobs), completed=there, speed="")
        start, written = time.monotonic(), 0
        for job, receipt in _run(missing, workers):
            receipts[job.tar] = receipt
            written += len(job.images)
            speed = f"{written / (time.monotonic() - start):,.0f} images/s"
            bar.update(task, advance=len(job.images), speed=speed)
    return receipts


def _run(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Receipt]]:
    """Yield each job with its receipt as it ends; a single worker is this process itself."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from ((job, write_shard(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(write_shard, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise PatchmillError(
                "a build worker died (out of memory?); run the same command again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when the build is killed: an orphan would write on under the feet of the next try."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's to handle
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()


def _broken(source: Path, rejected: list[tuple[str, str]], max_rejected: int) -> str:
    count = len(rejected)
    listed = ", ".join(f"{path} ({reason})" for path, reason in sorted(rejected)[:10])
    more = f" and {count - 10} more" if count > 10 else ""
    return (
        f"{count} broken image{'s' * (count > 1)} in {source}, {max_rejected} allowed: {listed}{more}; "
        f"mend or remove them, or leave them out with --max-rejected {count}"
    )


def _finish(plan: _Plan, receipts: list[Receipt]) -> Part:
    """Write the manifest of a part whose shards are all there, unless it is there already."""
    samples = sum(receipt.samples for receipt in receipts)
    if not samples:
        raise UserError(f"every image for {plan.folder} is broken; check the source")
    rejected = [entry for receipt in receipts for entry in receipt.rejected]
    size = sum(receipt.bytes for receipt in receipts)
    if not all((plan.folder / path).exists() for path in (manifest.DATASET, manifest.SHARDS)):
        rows = {
            "path": [manifest.shard_path(job.shard) for job in plan.jobs],
            "samples": [receipt.samples for receipt in receipts],
            "bytes": [receipt.bytes for receipt in receipts],
            "sha256": [receipt.sha256 for receipt in receipts],
        }
        manifest.write_table(plan.folder / manifest.SHARDS, pa.table(rows, schema=manifest.SHARDS_SCHEMA))
        info = Info(
            classes=plan.classes,
            samples=samples,
            bytes=size,
            image_bytes=sum(receipt.image_bytes for receipt in receipts),
            shards=len(receipts),
            digest=manifest.digest(plan.classes, rows["sha256"]),
            build=plan.build,
        )
        manifest.write_info(plan.folder, info)
    return Part(str(plan.folder), samples, len(receipts), size, rejected)
