"""One shard: what it is to hold, its tar, its sample table and its receipt."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from xxhash import xxh3_128_digest

from shards import manifest
from shards.decode import DecodeError, decode
from shards.encode import ENCODER, Encoding
from shards.errors import UserError
from shards.header import BrokenImageError, Header, read_header
from shards.manifest import Receipt
from shards.plan import read_job
from shards.sources import Item
from shards.sources.reader import Reader
from shards.store import Store, open_store
from shards.tarwrite import TAR, TarWriter


@dataclass(frozen=True)
class Form:
    """The form in which every sample of a data set is stored.

    Attributes:
        classes: Names of the classes, for captions.
        multi_label: Labels go into KEY.json instead of KEY.cls.
        encoding: How images are made anew.
        decode: Decode every image whole, to find damage inside.
        captions: Add KEY.txt with the names of the classes.
        border: Pixels to cut off at each edge.
    """

    classes: list[str]
    multi_label: bool = False
    encoding: Encoding = Encoding()  # noqa: RUF009, it is frozen
    decode: bool = False
    captions: bool = False
    border: int = 0

    def settings(self) -> dict:
        """Return what decides the bytes, beside the classes."""
        made_anew = self.encoding != Encoding()
        cut = {"border": {"pixels": self.border, "encoder": ENCODER}} if self.border else {}
        return cut | {
            "captions": self.captions,
            "decode": self.decode,
            "encoding": asdict(self.encoding) | {"encoder": ENCODER} if made_anew else None,
            "multi_label": self.multi_label,
            "tar": TAR,
        }


@dataclass(frozen=True)
class Job:
    """One shard to write into the data set ``out``: ``samples`` images, listed in the file ``items``.

    ``plan`` is the digest of the whole plan: together with the number it decides every byte. ``changed`` is when the
    newest of its images was, nanoseconds since 1970.
    """

    out: str
    shard: int
    samples: int
    changed: int
    items: Path
    plan: str
    reader: Reader
    form: Form


def finished(store: Store, shard: int, plan: str, changed: int) -> Receipt | None:
    """Return the receipt of a shard that was written by this plan, is whole, and not older than its newest image."""
    tar = manifest.shard_path(shard)
    try:
        receipt = manifest.read_receipt(store, manifest.samples_path(shard))
        whole = receipt.bytes == store.size(tar) and changed <= store.modified(tar)
    except (UserError, OSError, ValueError, KeyError, TypeError):  # missing, damaged or written by something else
        return None
    return receipt if whole and receipt.plan == plan else None


def write_shard(job: Job) -> Receipt:
    """Write the tar, then the sample table with the receipt; broken images are left out and listed in it.

    Raises:
        UserError: An image cannot be read, or is no longer what the plan says.
        PatchmillError: The network failed, in spite of retries.
    """
    store, tar = open_store(job.out, create=True), manifest.shard_path(job.shard)
    items = read_job(job.items)
    store.delete(manifest.samples_path(job.shard))  # an old receipt must not vouch for the new tar
    rows: dict[str, list] = {name: [] for name in manifest.SAMPLES_SCHEMA.names}
    rejected = []
    with store.new_file(tar) as path, open(path, "wb", buffering=1 << 20) as file:
        writer = TarWriter(file)
        for item, data in job.reader.read_all(items):
            try:
                if isinstance(data, BrokenImageError):
                    raise data
                data, header, orientation = _stored(item, data, job.form)
            except BrokenImageError as error:
                rejected.append((_name(item), str(error)))
                continue
            except DecodeError as error:
                rejected.append((_name(item), str(error.__cause__)))
                continue
            members = {header.format: data, **_members(item, job.form)}
            places = {
                extension: writer.add(f"{item.key}.{extension}", members[extension]) for extension in sorted(members)
            }
            place = places[header.format]
            row = {
                "key": item.key,
                "offset": place.offset,
                "size": len(data),
                "format": header.format,
                "labels": item.labels,
                "weights": item.weights or None,
                "width": header.width,
                "height": header.height,
                "orientation": orientation,
                "member": place.header,
                "xxh128": xxh3_128_digest(data),
            }
            for name, value in row.items():
                rows[name].append(value)
        writer.close()
    receipt = Receipt(
        sha256=writer.sha256.hexdigest(),
        bytes=writer.bytes,
        samples=len(rows["key"]),
        image_bytes=sum(rows["size"]),
        plan=job.plan,
        rejected=rejected,
    )
    manifest.write_samples(store, manifest.samples_path(job.shard), rows, receipt)
    return receipt


def _stored(item: Item, data: bytes, form: Form) -> tuple[bytes, Header, int]:
    """Return an image as it is to be stored, its header, and the orientation it had in the source."""
    source = read_header(data)
    anew = form.encoding.apply(data, source, item.key, form.border)
    if anew is not None:
        return *anew, source.orientation
    if form.decode:
        decode(data, item.key)
    return data, source, source.orientation


def _members(item: Item, form: Form) -> dict[str, bytes]:
    """Return what is stored beside the image, by extension."""
    if form.multi_label:
        labels = {"labels": item.labels} | ({"weights": item.weights} if item.weights else {})
        members = {"json": json.dumps(labels).encode()}
    else:
        members = {"cls": str(item.labels[0]).encode()}
    if form.captions:
        members["txt"] = ", ".join(form.classes[label] for label in item.labels).encode()
    return members


def _name(item: Item) -> str:
    """Return what a user finds an image by: its file, or a place in one and the key.

    A file ``@/...`` is ours, but its key tells file and row.
    """
    if item.file.startswith("@/"):
        return item.key
    return item.file if item.offset == 0 else f"{item.file} at byte {item.offset}, {item.key}"
