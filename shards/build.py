"""Images of any source into a data set: plan all shards, write each on its own, then the manifest.

    source --items--> plan (plan.py) --jobs--> shards (shard.py) --receipts--> manifest (merge.py)

The plan is a function of the source and the settings alone. So any number of workers, or of machines with a slice each,
writes the same bytes, and a killed build goes on where it was.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from shards import manifest
from shards.atomic import LOCK, only_one
from shards.encode import FORMATS, Encoding
from shards.errors import UserError
from shards.manifest import Info, Receipt
from shards.merge import Building, PartBuilding, Result, clear, finish, finished_shards, read_building, write_building
from shards.objects import MissingError
from shards.plan import WHOLE, Slice, job_file, make_plan
from shards.progress import ImageProgress
from shards.rejected import too_many
from shards.shard import Form, Job, write_shard
from shards.sources import Item
from shards.sources.open import open_source
from shards.sources.reader import Reader
from shards.store import open_store
from shards.urls import parts_of
from shards.workers import cores, run_jobs

_IMAGES_A_WORKER = 1_000  # a process starts in the time that another writes these
_REMEDY = "choose another folder, or remove it first"


@dataclass(frozen=True)
class _Workplace:
    """Where a build keeps what it needs on the way: its plan, images that cannot be read in place, a folder to lock."""

    begin: Path
    plan: Path
    unpacked: Path


def build(
    source: str | Path,
    out: str | Path,
    *,
    kind: str | None = None,
    options: dict[str, str] | None = None,
    shard_samples: int = 10_000,
    shard_bytes: int = 1_000_000_000,
    split: dict[str, float] | None = None,
    seed: int = 0,
    encoding: Encoding = Encoding(),  # noqa: B008, it is frozen
    decode: bool = False,
    captions: bool = False,
    workers: int | None = None,
    own: Slice = Slice(),  # noqa: B008, it is frozen
    max_rejected: int = 0,
    dry_run: bool = False,
    progress: bool = False,
) -> Result:
    """Build a data set from images; run again, it goes on where it was.

    Args:
        source: Path or URL of what ``shards/sources`` can read.
        out: Folder or URL of the data set to make. With a split, or a source that has parts itself, each part is a data
            set of its own in it.
        kind: Of the source, where it cannot be told by looking.
        options: Of that kind of source.
        shard_samples: At most so many samples a shard.
        shard_bytes: At most so many bytes of images, as the source has them, a shard (but one image at least).
        split: Share of each part beside ``train``, as in ``{"val": 0.1}``. A hash of its key puts an image
            into its part, so that adding images moves none.
        seed: Of the global shuffle.
        encoding: How to make images anew; by default their bytes are kept.
        decode: Decode every image whole, to find damage inside; otherwise only header and end of a file are looked at.
        captions: Add KEY.txt with the class names.
        workers: Processes; by default one for each core this process may use, as far as starting them pays.
            No influence on the bytes.
        own: The shards to write here; other slices write the others, and ``merge`` ends the build.
        max_rejected: So many broken images are left out, and listed in the receipts; one more is an error.
        dry_run: Plan, and write nothing.
        progress: Show a progress bar on stderr.

    Raises:
        UserError: The source, a setting or an image is bad, or ``out`` holds something else. There is no new
            data set then, but the whole shards stay for the next try.
        PatchmillError: The network or a worker failed.
    """
    split = split or {}
    _check(source, out, shard_samples, shard_bytes, workers, max_rejected, split, encoding)
    layout: dict[str, Any] = {"split": split, "seed": seed, "shard_samples": shard_samples, "shard_bytes": shard_bytes}
    try:
        with _workplace(out, own, dry_run) as work:
            if not dry_run:
                _check_settings(out, layout | Form([], False, encoding, decode, captions).settings())
            found = open_source(str(source), kind, unpacked=work.unpacked, to_read=not dry_run, **(options or {}))
            with ImageProgress("listing images", None, show=progress) as bar:
                plans = make_plan(_counted(found.items(), bar), work.plan, **layout, own=own)
            if empty := next((part for part in found.parts if part not in plans), None):
                raise UserError(f"{source} has no images in its part {empty}; get it again")
            form = Form(found.classes, found.multi_label, encoding, decode, captions, found.border)
            _check_classes(found.classes)
            settings = {"source": found.kind, **layout, **form.settings()}
            parts = {
                name: PartBuilding(
                    plan.samples, plan.changed, plan.bytes, settings | {"part": name, "plan": plan.digest}
                )
                for name, plan in plans.items()
            }
            building = Building(found.classes, found.others, parts)
            for name in parts:
                _check_apart(source, building.url(out, name))
            if dry_run:
                return building.planned(out)
            with only_one(work.begin, "build", wait=60):  # slices begin one after the other
                building = _begin(out, building, own)
            reader = Reader(found.root, work.unpacked)
            jobs = [
                Job(building.url(out, name), shard, *planned, job_file(work.plan, name, shard), plan, reader, form)
                for name, part in building.parts.items()
                for plan in [building.plan(name)]
                for shard, planned in enumerate(zip(part.samples, part.changed, strict=True))
                if own.has(shard)
            ]
            receipts = _write_all(jobs, workers, max_rejected, str(source), progress)
            if own.count == 1:
                return finish(out, building, receipts)
            return building.partly(out, receipts)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out}: {error.strerror}; mend that and run the same "
            "command again, it keeps what is finished"
        ) from error


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


def _check(
    source: str | Path,
    out: str | Path,
    shard_samples: int,
    shard_bytes: int,
    workers: int | None,
    max_rejected: int,
    split: dict[str, float],
    encoding: Encoding,
) -> None:
    _at_least("shard-samples", shard_samples, 1)
    _at_least("shard-bytes", shard_bytes, 1)
    _at_least("workers", 1 if workers is None else workers, 1)
    _at_least("max-rejected", max_rejected, 0)
    _at_least("resize-short", 1 if encoding.resize_short is None else encoding.resize_short, 1)
    if encoding.quality is not None and not 1 <= encoding.quality <= 100:
        raise UserError(f"--quality {encoding.quality}: must lie between 1 and 100")
    if encoding.format not in (None, *FORMATS):
        raise UserError(f"--format {encoding.format}: the formats are {', '.join(FORMATS)}")
    _check_split(split)
    _check_apart(source, out)
    if (local := _local_path(out)) and local.exists() and not local.is_dir():
        raise UserError(f"output {out} is a file; choose a folder")


def _check_apart(source: str | Path, url: str | Path) -> None:
    """Refuse to write a data set into its source, or over it."""
    given, made = _local_path(source), _local_path(url)
    if not (given and made):
        if str(source).rstrip("/") == str(url).rstrip("/"):
            raise UserError(f"output {url} is the source itself; choose another folder")
        return
    given, made = given.resolve(), made.resolve()
    if made.is_relative_to(given):
        raise UserError(f"output {url} lies in the source {source}; choose a folder outside")
    for folder in ("shards", "manifest", ".build"):
        if given.is_relative_to(made / folder):
            raise UserError(f"output {url} would be written over the source {source}; choose another folder")


def _check_classes(classes: list[str]) -> None:
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the class name {name!r} is not UTF-8; rename it") from error


def _counted(items: Iterable[Item], bar: ImageProgress) -> Iterator[Item]:
    """Pass items on, and show how many there are."""
    number = 0
    for number, item in enumerate(items, 1):
        if number % 10_000 == 0:
            bar.advance(10_000, 0)
        yield item
    bar.advance(number % 10_000, 0)


def _check_split(split: dict[str, float]) -> None:
    for name, share in split.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in ("train", WHOLE):
            raise UserError(f"--split {name}={share}: name the part with letters and digits; train is the rest")
        if not 0 < share < 1:
            raise UserError(f"--split {name}={share}: the share must lie between 0 and 1")
    if sum(split.values()) >= 1:
        raise UserError(f"--split shares add up to {sum(split.values()):g}; leave something for train")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{name} {value}: must be at least {least}")


@contextmanager
def _workplace(out: str | Path, own: Slice, dry_run: bool) -> Iterator[_Workplace]:
    """Keep other builds out, and yield folders to work in: inside a local ``out``, else in the temporary folder.

    What is unpacked stays for the next try. Slices on one file system share it, so there a merge removes it.
    """
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="patchmill-") as folder:
            yield _Workplace(Path(folder), Path(folder) / "plan", Path(folder) / "unpacked")
        return
    name = f"slice-{own.index}-of-{own.count}"
    local = _local_path(out)
    if local:
        base, shared = local / ".build", own.count > 1
    else:  # the same folder for every try of this slice
        base, shared = _own_folder(f"{out} {name}"), False
    work = _Workplace(base / "begin", base / name, base / "unpacked")
    fresh = local and not local.exists()
    finished, keep = False, True
    try:
        with only_one(local or base, "build", shared=shared):
            try:
                with only_one(work.plan, "build of this slice"):
                    _empty(work.plan)  # of what a killed try left
                    try:
                        yield work
                        finished = True
                    finally:
                        _empty(work.plan)
            finally:
                _remove_empty(work.plan)
                keep = shared or bool(work.unpacked.exists() and not finished and read_building(out))
                if not keep and base.is_dir():  # else it could not be made, and the error says why
                    _empty(base)
    except UserError:
        if local and fresh and not any(path.is_file() and path.name != LOCK for path in local.rglob("*")):
            shutil.rmtree(local)  # nothing was begun: leave nothing
        raise
    finally:
        if not keep:
            _remove_empty(base)


def _empty(folder: Path) -> None:
    """Remove what is in a folder but its lock: over NFS a folder stays as long as a file in it is open."""
    for old in folder.iterdir():
        if old.name != LOCK:
            shutil.rmtree(old) if old.is_dir() else old.unlink()


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # somebody else is there by now
        folder.rmdir()


def _own_folder(purpose: str) -> Path:
    """Return a folder in the temporary one that is the same for every try, and nobody else's: jobs are read from it."""
    name = hashlib.sha256(purpose.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"patchmill-build-{os.getuid()}-{name}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} is somebody else's; remove it or set TMPDIR to another folder")
    return folder


def _local_path(url: str | Path) -> Path | None:
    """Return the path of a local folder; None of a remote one."""
    if str(url).startswith("file://"):
        return Path(unquote(parts_of(str(url)).path))
    return None if "://" in str(url) else Path(url)


def _made(out: str | Path) -> dict[str, Info]:
    """Return the data sets that there are at ``out`` and in its folders, by part."""
    try:
        root = open_store(out)
    except MissingError:
        return {}
    made = {}
    for name in [WHOLE, *root.folders()]:
        path = manifest.DATASET if name == WHOLE else f"{name}/{manifest.DATASET}"
        with suppress(MissingError):
            made[name] = manifest.parse_info(
                root.read(path), f"{out}/{path.removesuffix(manifest.DATASET)}".rstrip("/")
            )
    return made


def _check_settings(out: str | Path, settings: dict) -> None:
    """Refuse another data set's place as early as can be told: before the source is listed and unpacked."""
    for name, info in _made(out).items():
        _refuse(out, name, [key for key in settings if key != "multi_label" and info.build.get(key) != settings[key]])


def _refuse(out: str | Path, name: str, other: list[str]) -> None:
    if other:
        what = ", ".join("images" if key == "plan" else key for key in other)
        where = out if name == WHOLE else f"{out}/{name}"
        raise UserError(f"output {where} already holds another data set ({what} differ); {_REMEDY}")


def _begin(out: str | Path, building: Building, own: Slice) -> Building:
    """Say at ``out`` what is being built there, unless it holds something else; return it as all slices know it.

    Raises:
        UserError: ``out`` holds something else than an earlier try of the same build.
    """
    begun = read_building(out)
    if own.count > 1 and begun not in (None, building):
        raise UserError(
            f"output {out} holds slices of another build (source or settings differ); give every slice the same, or "
            "choose another folder"
        )
    for name, info in _made(out).items():
        if name not in building.parts:
            raise UserError(f"output {out} already holds another data set, {building.url(out, name)}; {_REMEDY}")
        new = building.parts[name].build | {"classes": building.classes}
        old = info.build | {"classes": info.classes}
        _refuse(out, name, [key for key in new if old.get(key) != new[key]])
    for name in building.parts:
        store = open_store(building.url(out, name), create=True)
        if store.list("shards") and not (begun or store.list("manifest/samples")):
            raise UserError(f"output {store.url} holds shards that no build of ours began; {_REMEDY}")
    if begun == building:  # another slice may have seen newer images
        building = building.newest(begun)
    elif begun:
        for name in begun.parts.keys() - building.parts.keys():
            clear(open_store(begun.url(out, name), create=True), 0)
    write_building(out, building)
    return building


def _write_all(
    jobs: list[Job], workers: int | None, max_rejected: int, source: str, progress: bool
) -> dict[tuple[str, int], Receipt]:
    """Write the shards that are not finished yet; return the receipts of all by data set and shard."""
    receipts = finished_shards({(job.out, job.shard): (job.plan, job.changed) for job in jobs})
    stores = {job.out: open_store(job.out, create=True) for job in jobs}
    rejected = [entry for receipt in receipts.values() for entry in receipt.rejected]
    if len(rejected) > max_rejected and not all(store.exists(manifest.DATASET) for store in stores.values()):
        # That stopped the last try, and was to be mended: of an image on the web, nothing else tells that it was.
        receipts, rejected = {place: receipt for place, receipt in receipts.items() if not receipt.rejected}, []
    missing = [job for job in jobs if (job.out, job.shard) not in receipts]
    for url in {job.out for job in missing}:  # what follows takes its whole data set apart: unmark it
        stores[url].delete(manifest.DATASET)
    images = sum(job.samples for job in missing)
    workers = workers or max(1, min(cores(), images // _IMAGES_A_WORKER))
    there = sum(job.samples for job in jobs) - images
    with ImageProgress("building shards", images + there, done=there, show=progress) as bar:
        _stop_at(rejected, max_rejected, source)
        for job, receipt in run_jobs(write_shard, missing, min(workers, len(missing))):
            receipts[job.out, job.shard] = receipt
            bar.advance(job.samples, receipt.bytes, len(receipt.rejected))
            rejected += receipt.rejected
            _stop_at(rejected, max_rejected, source)
    return receipts


def _stop_at(rejected: list[tuple[str, str]], max_rejected: int, source: str) -> None:
    if len(rejected) > max_rejected:
        remedy = f"mend or remove them, or leave them out with --max-rejected {len(rejected)}"
        raise too_many(rejected, max_rejected, "image", source, remedy)
