"""From finished shards to a data set: the manifest, once every shard of a build has its receipt.

While a build is under way, on one machine or in slices on many, ``building.json`` says what it is to become.
"""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from shards import manifest
from shards.atomic import only_one
from shards.errors import UserError
from shards.localstore import LocalStore
from shards.manifest import Receipt
from shards.objects import MissingError
from shards.plan import WHOLE, Slice
from shards.shard import finished
from shards.store import Store, open_store

BUILDING = "building.json"


@dataclass(frozen=True)
class Part:
    """One data set that a build makes: ``bytes`` are those of its tars, ``rejected`` holds (image, reason)."""

    url: str
    samples: int
    shards: int
    bytes: int
    rejected: list[tuple[str, str]]


@dataclass(frozen=True)
class Result:
    """What a build made: parts by name (``all`` without a split), other files left out by extension.

    ``finished`` is False for a slice, which has only its own shards to tell of.
    """

    classes: list[str]
    others: dict[str, int]
    parts: dict[str, Part]
    finished: bool = True


@dataclass(frozen=True)
class PartBuilding:
    """One data set to make.

    Attributes:
        samples: Planned for each shard.
        changed: When the newest image of each shard was, nanoseconds since 1970, as the last slice saw it.
        bytes: Of the images, as far as known.
        build: Settings that decide its bytes.
    """

    samples: list[int]
    changed: list[int] = field(compare=False)
    bytes: int
    build: dict


@dataclass(frozen=True)
class Building:
    """What a build is to make; the content of ``building.json``."""

    classes: list[str]
    others: dict[str, int]
    parts: dict[str, PartBuilding]

    def url(self, out: str | Path, name: str) -> str:
        """Return where a part goes."""
        return str(out) if name == WHOLE else f"{out}/{name}"

    def plan(self, name: str) -> str:
        """Return the hex digest of all that decides the bytes of a part: its shards' receipts carry it."""
        return sha256(json.dumps([self.classes, self.parts[name].build], sort_keys=True).encode()).hexdigest()

    def newest(self, other: "Building") -> "Building":
        """Return this build with the later times of the two at which images were changed."""
        parts = {
            name: replace(
                part, changed=[max(pair) for pair in zip(part.changed, other.parts[name].changed, strict=True)]
            )
            for name, part in self.parts.items()
        }
        return replace(self, parts=parts)

    def planned(self, out: str | Path) -> Result:
        """Return what the build would make; bytes are those of the images, as far as known."""
        parts = {
            name: Part(self.url(out, name), sum(part.samples), len(part.samples), part.bytes, [])
            for name, part in self.parts.items()
        }
        return Result(self.classes, self.others, parts, finished=False)

    def partly(self, out: str | Path, receipts: dict[tuple[str, int], Receipt]) -> Result:
        """Return what the shards with these receipts, by data set and number, amount to."""
        parts = {}
        for name in self.parts:
            url = self.url(out, name)
            own = [receipts[key] for key in sorted(receipts) if key[0] == url]
            parts[name] = _part(url, own)
        return Result(self.classes, self.others, parts, finished=False)


def read_building(out: str | Path) -> Building | None:
    """Read ``building.json``; None if no build is under way."""
    try:
        fields = json.loads(open_store(out).read(BUILDING))
        parts = {name: PartBuilding(**part) for name, part in fields.pop("parts").items()}
        return Building(**fields, parts=parts)
    except MissingError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out}/{BUILDING} is damaged ({error}); remove it and build again") from error


def write_building(out: str | Path, building: Building) -> None:
    """Write ``building.json``."""
    text = json.dumps(asdict(building), sort_keys=True) + "\n"
    open_store(out, create=True).write(BUILDING, text.encode())


def merge(out: str | Path) -> Result:
    """Make data sets of the shards that all slices of a build wrote. Doing it again changes nothing.

    Raises:
        UserError: There is no build at ``out``, or some of its shards are missing.
    """
    building = read_building(out) or _built(out)
    root = open_store(out)
    if not isinstance(root, LocalStore):
        return finish(out, building, _receipts(out, building))
    with only_one(Path(root.url), "build"):
        result = finish(out, building, _receipts(out, building))
        shutil.rmtree(Path(root.url) / ".build", ignore_errors=True)
    return result


def _built(out: str | Path) -> Building:
    """Return the build that made what is there, as its manifests tell."""
    root = open_store(out)
    found = {}
    for name in [WHOLE, *root.folders()]:
        store = open_store(root.url if name == WHOLE else f"{root.url}/{name}")
        if store.exists(manifest.DATASET):
            info = manifest.read_info(store)
            sizes = manifest.open_table(store, manifest.SHARDS, ["samples"])["samples"].to_pylist()
            if "plan" in info.build:
                found[name] = info.classes, PartBuilding(sizes, [0] * len(sizes), info.image_bytes, info.build)
    if not found:
        raise UserError(f"no build is under way at {out}; begin one with `patchmill shards build`")
    return Building(next(iter(found.values()))[0], {}, {name: part for name, (_, part) in found.items()})


def _receipts(out: str | Path, building: Building) -> dict[tuple[str, int], Receipt]:
    """Read the receipts of all shards, by data set and number.

    Raises:
        UserError: Some are missing, or of another plan.
    """
    wanted = {
        (building.url(out, name), shard): (plan, changed)
        for name, part in building.parts.items()
        for plan in [building.plan(name)]
        for shard, changed in enumerate(part.changed)
    }
    receipts = finished_shards(wanted)
    if missing := [f"{url}/{manifest.shard_path(shard)}" for url, shard in wanted if (url, shard) not in receipts]:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"{len(missing)} of {len(wanted)} shards are not built yet, or are older than their images: "
            f"{', '.join(missing[:5])}{more}; run the slices that make them (shard number modulo N is I of --slice "
            "I/N), then merge again"
        )
    return receipts


def finished_shards(wanted: dict[tuple[str, int], tuple[str, int]]) -> dict[tuple[str, int], Receipt]:
    """Return the receipts that there are of (data set, shard): (plan, when the newest image was)."""
    stores = {url: open_store(url, create=True) for url, _ in wanted}
    with ThreadPoolExecutor(32) as pool:  # each is some round trips to a bucket
        found = pool.map(lambda place: finished(stores[place[0]], place[1], *wanted[place]), wanted)
        return {place: receipt for place, receipt in zip(wanted, found, strict=True) if receipt}


def count_written(out: Path, own: Slice) -> int:
    """Return how many shards of a slice have a receipt in a local folder: what a build need not write again."""
    tables = out.glob(f"**/{Path(manifest.samples_path(0)).parent}/[0-9]*.parquet")
    return sum(own.has(int(table.stem)) for table in tables)


def finish(out: str | Path, building: Building, receipts: dict[tuple[str, int], Receipt]) -> Result:
    """Write the manifests of a build whose shards are all there, and take away what marks it as unfinished."""
    parts = {}
    for name, part in building.parts.items():
        url = building.url(out, name)
        parts[name] = _write_manifest(url, building.classes, part, [receipts[url, i] for i in range(len(part.samples))])
    open_store(out).delete(BUILDING)
    return Result(building.classes, building.others, parts)


def _write_manifest(url: str, classes: list[str], part: PartBuilding, receipts: list[Receipt]) -> Part:
    """Write the manifest of a part, unless it is there already."""
    made = _part(url, receipts)
    if not made.samples:
        raise UserError(f"every image for {url} is broken; check the source")
    store = open_store(url)
    clear(store, len(receipts))
    if not all(store.exists(path) for path in (manifest.DATASET, manifest.SHARDS)):
        _check_drop_lists(store, receipts)
        paths = [manifest.shard_path(shard) for shard in range(len(receipts))]
        manifest.write_manifest(store, classes, paths, receipts, part.build)
    return made


def _check_drop_lists(store: Store, receipts: list[Receipt]) -> None:
    """Refuse to end a data set whose drop lists were written for other shards: they count samples by their place."""
    lists = [name.removesuffix(".parquet") for name in store.list(manifest.EXCLUDE)]
    if not lists:
        return
    try:
        before = manifest.open_table(store, manifest.SHARDS, ["sha256"])["sha256"].to_pylist()
    except UserError:
        before = []
    if before != [receipt.sha256 for receipt in receipts]:
        raise UserError(
            f"{store.url} has drop lists ({', '.join(lists[:5])}), which count samples by their place, and now other "
            "shards than they were written for; remove manifest/exclude and run the same command again, or build into "
            "another folder"
        )


def clear(store: Store, shards: int) -> None:
    """Remove what other tries left in a data set of so many shards: partial files, and shards beyond."""
    for folder in ("shards", "manifest", "manifest/samples"):
        for name in store.list(folder):
            ours = re.fullmatch(r"(\d{6,})\.(tar|parquet)", name)
            if (ours and int(ours[1]) >= shards) or re.fullmatch(r"\..*\.partial", name):
                store.delete(f"{folder}/{name}")


def _part(url: str, receipts: list[Receipt]) -> Part:
    return Part(
        url,
        sum(receipt.samples for receipt in receipts),
        len(receipts),
        sum(receipt.bytes for receipt in receipts),
        [entry for receipt in receipts for entry in receipt.rejected],
    )
