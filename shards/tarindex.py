"""One tar of somebody else's: walked once, and written down in a sample table with its receipt."""

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xxhash import xxh3_128_digest

from shards import manifest
from shards.errors import UserError
from shards.header import BrokenImageError, read_header
from shards.labels import ClassNames, LabelError, LabelRule, as_index
from shards.manifest import Info, Receipt
from shards.objects import MissingError
from shards.store import open_store
from shards.tarscan import BLOCK, DamagedTarError, Member, TarScan

IMAGES = ("jpg", "jpeg", "png", "webp")


class NoImageError(BrokenImageError):
    """No file of a sample is an image."""


class TwiceError(BrokenImageError):
    """Two images of a sample have one extension."""


@dataclass(frozen=True)
class Reading:
    """How samples are read.

    Attributes:
        label: Where labels stand.
        image: Extension of the image; empty to find it.
        classes: Names of all classes, if they are known beforehand.
    """

    label: LabelRule
    image: str = ""
    classes: list[str] | None = None

    @cached_property
    def settings(self) -> dict:
        """What decides the rows of a sample table, beside the tar's content."""
        classes = self.classes and hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()
        return {"label": str(self.label), "image": self.image, "classes": classes}

    @classmethod
    def of(cls, info: Info) -> "Reading":
        """Return how the samples of an index were read."""
        classes = info.classes if info.build["classes"] else None
        return cls(LabelRule.parse(info.build["label"]), info.build["image"], classes)

    def wants(self, extension: str) -> bool:
        """Tell whether a member's data are needed."""
        return self.label.wants(extension) or self._may_be_image(extension)

    def image_of(self, members: list[Member]) -> Member:
        """Return the image of a sample: ``jpg`` goes before ``seg.jpg``.

        Raises:
            NoImageError: There is none.
            TwiceError: The key is there twice, one right after the other.
            BrokenImageError: There is more than one.
        """
        found = [member for member in members if self._may_be_image(member.extension)]
        found = [member for member in found if "." not in member.extension] or found
        if not found:
            raise NoImageError(f"no image, only {_extensions(members)}")
        if len({member.extension for member in found}) < len(found):
            raise TwiceError(f"the key is there twice, {_extensions(found)}: rename one, or remove it")
        if len(found) > 1:
            raise BrokenImageError(f"several images, {_extensions(found)}: choose with --image")
        return found[0]

    def _may_be_image(self, extension: str) -> bool:
        return extension == self.image if self.image else extension.rpartition(".")[2] in IMAGES


@dataclass(frozen=True)
class Job:
    """One tar to index: ``path`` in the folder ``tars``, as number ``shard`` of the data set ``out``."""

    tars: str
    path: str
    out: str
    shard: int
    reading: Reading

    def plan(self) -> str:
        """Return the hex digest of what decides the table, beside the tar's content."""
        return hashlib.sha256(json.dumps([self.path, self.reading.settings], sort_keys=True).encode()).hexdigest()


def index_tar(job: Job) -> Receipt | str:
    """Index one tar; return its receipt, or what is wrong with the tar.

    The receipt's ``notes`` hold what is known of labels: ``names`` of the classes in this tar and their ``ids`` in the
    table (none where the labels are numbers), ``top``, the largest label; and ``unlabelled``, ``skipped`` and
    ``trailing`` (see TarScan).

    Raises:
        UserError: Labels are numbers and names at once.
        PatchmillError: The network failed, in spite of retries.
    """
    tars, out = open_store(job.tars), open_store(job.out, create=True)
    try:
        scan = TarScan(tars, job.path, job.reading.wants, hashed=True)
        rows, labels, rejected = _walk(scan, job.reading)
    except (DamagedTarError, MissingError) as error:
        return str(error)
    rows["labels"], notes = _number(labels, rows["key"], scan.name, job.reading)
    notes |= {"skipped": dict(sorted(scan.skipped.items())), "trailing": scan.trailing}
    receipt = Receipt(
        sha256=scan.sha256,
        bytes=scan.bytes,
        samples=len(rows["key"]),
        image_bytes=sum(rows["size"]),
        plan=job.plan(),
        rejected=rejected,
        notes=notes,
    )
    manifest.write_samples(out, manifest.samples_path(job.shard), rows, receipt)
    return receipt


def _walk(scan: TarScan, reading: Reading) -> tuple[dict[str, list], list[list], list[tuple[str, str]]]:
    """Return the columns of the table, the labels as they stand in the tar, and the samples left out."""
    rows: dict[str, list] = {name: [] for name in manifest.SAMPLES_SCHEMA.names}
    labels: list[list] = []
    rejected: list[tuple[str, str]] = []
    times: Counter[str] = Counter()  # how often each key begins a sample
    bare = []  # places among the rejected: samples without an image
    names = ClassNames(reading.classes) if reading.classes is not None else None
    for sample in scan:
        times[sample.key] += 1
        try:
            image = reading.image_of(sample.members)
            header = read_header(image.data or b"")
            found = reading.label.find(sample.members)
            numbers = [names.index(label) if names else as_index(label) for label in found.labels]
            if len(set(numbers) - {None}) < len(numbers) - numbers.count(None):
                raise LabelError(f"one class twice: {found.labels}")
        except (BrokenImageError, LabelError) as error:
            if isinstance(error, NoImageError):
                bare.append(len(rejected))
            rejected.append((sample.key, str(error)))
            continue
        labels.append(numbers if names else found.labels)
        row = {
            "key": sample.key,
            "offset": image.offset,
            "size": image.size,
            "format": header.format,
            "weights": found.weights if set(found.weights) - {1.0} else None,
            "width": header.width,
            "height": header.height,
            "orientation": header.orientation,
            "member": image.header,
            "xxh128": xxh3_128_digest(image.data or b""),
        }
        for name, value in row.items():
            rows[name].append(value)
    for place in bare:
        key, reason = rejected[place]
        if times[key] > 1:
            rejected[place] = key, f"{reason}: its files do not lie together, make the tar anew, sorted by name"
    return rows, labels, rejected


def _number(labels: list[list], keys: list[str], tar: str, reading: Reading) -> tuple[list[list[int]], dict]:
    """Return labels as numbers, and notes that tell what they mean."""
    notes: dict[str, Any] = {"names": None, "ids": None, "unlabelled": sum(not each for each in labels)}
    if reading.classes is None and any(as_index(label) is None for each in labels for label in each):
        for key, each in zip(keys, labels, strict=True):
            if any(isinstance(label, int) for label in each):
                raise UserError(
                    f"{tar}: {key} has the label {each[0]}, others have class names; give --classes, a file of all "
                    "names"
                )
        names = sorted({label for each in labels for label in each})
        number = {name: place for place, name in enumerate(names)}
        notes |= {"names": names, "ids": list(range(len(names)))}
        labels = [[number[label] for label in each] for each in labels]
    else:
        labels = [[as_index(label) for label in each] for each in labels]
    return labels, notes | {"top": max((label for each in labels for label in each), default=-1)}


def finished(job: Job) -> Receipt | None:
    """Return the receipt of an earlier run if both tar and table are as they were then, as far as a look tells."""
    tars, out = open_store(job.tars), open_store(job.out, create=True)
    path = manifest.samples_path(job.shard)
    try:
        receipt = manifest.read_receipt(out, path)
        if (
            receipt.plan != job.plan()
            or receipt.bytes != tars.size(job.path)
            or tars.changed(job.path) > out.modified(path)
        ):
            return None
        table = manifest.open_table(out, path, ["offset", "member"])
    except UserError:  # missing, damaged or written by something else
        return None
    for row in {0, len(table) - 1} if len(table) else ():  # a copy may keep an old time
        header = tars.read_range(job.path, table["offset"][row].as_py() - BLOCK, BLOCK)
        if zlib.crc32(header) != table["member"][row].as_py():
            return None
    return receipt if len(table) == receipt.samples else None


def renumber(job: tuple[str, int, list[str]]) -> None:
    """Give the labels of one table, which has names in its notes, the numbers of the whole data set.

    Args:
        job: The data set, the shard, and all classes in order.
    """
    url, shard, classes = job
    store, path = open_store(url), manifest.samples_path(shard)
    receipt = manifest.read_receipt(store, path)
    number = {name: place for place, name in enumerate(classes)}
    ids = [number[name] for name in receipt.notes["names"]]
    if ids == receipt.notes["ids"]:
        return
    new = dict(zip(receipt.notes["ids"], ids, strict=True))
    receipt.notes |= {"ids": ids, "top": max(ids, default=-1)}
    table = manifest.open_table(store, path, manifest.SAMPLES_SCHEMA.names)
    rows = {name: table[name] for name in table.column_names}
    rows["labels"] = [[new[label] for label in each] for each in table["labels"].to_pylist()]
    manifest.write_samples(store, path, rows, receipt)


def _extensions(members: list[Member]) -> str:
    counted = Counter(f".{member.extension}" for member in members)
    return " ".join(sorted(counted.elements())[:8])
