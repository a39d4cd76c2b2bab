"""Small data sets written by hand, so that what reads them is tested apart from what builds them."""

import hashlib
import io
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image
from xxhash import xxh3_128_digest

from shards import manifest
from shards.dataset import Dataset
from shards.header import read_header
from shards.store import open_store

BLOCK = 512  # of a tar


@dataclass
class Made:
    """One sample to write."""

    key: str
    image: bytes
    labels: tuple[int, ...] = (0,)
    weights: tuple[float, ...] | None = None
    orientation: int = 1


def plain(colour: str | tuple, size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
    """Return an encoded image of one colour, ``size`` as (width, height)."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format)
    return file.getvalue()


def write_dataset(folder: Path, classes: list[str], shards: list[list[Made]]) -> Path:
    """Write tars and manifest of samples as they are given: keys may repeat, labels may be missing."""
    store, receipts = open_store(folder, create=True), []
    for shard, samples in enumerate(shards):
        path = folder / manifest.shard_path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {name: [] for name in manifest.SAMPLES_SCHEMA.names}
        with tarfile.open(path, "w") as tar:
            for sample in samples:
                header = read_header(sample.image)
                member = tarfile.TarInfo(f"{sample.key}.{header.format}")
                member.size = len(sample.image)
                tar.addfile(member, io.BytesIO(sample.image))
                offset = tar.offset - -(-member.size // BLOCK) * BLOCK  # long names have further headers before it
                tar.fileobj.flush()
                row = {
                    "key": sample.key,
                    "offset": offset,
                    "size": len(sample.image),
                    "format": header.format,
                    "labels": list(sample.labels),
                    "weights": sample.weights and list(sample.weights),
                    "width": header.width,
                    "height": header.height,
                    "orientation": sample.orientation,
                    "member": zlib.crc32(path.read_bytes()[offset - BLOCK : offset]),
                    "xxh128": xxh3_128_digest(sample.image),
                }
                for name, value in row.items():
                    rows[name].append(value)
        tar_bytes = path.read_bytes()
        receipt = manifest.Receipt(
            hashlib.sha256(tar_bytes).hexdigest(), len(tar_bytes), len(samples), sum(rows["size"]), plan=""
        )
        manifest.write_samples(store, manifest.samples_path(shard), rows, receipt)
        receipts.append(receipt)
    table = {
        "path": [manifest.shard_path(shard) for shard in range(len(shards))],
        "samples": [receipt.samples for receipt in receipts],
        "bytes": [receipt.bytes for receipt in receipts],
        "sha256": [receipt.sha256 for receipt in receipts],
    }
    manifest.write_table(store, manifest.SHARDS, pa.table(table, schema=manifest.SHARDS_SCHEMA))
    info = manifest.Info(
        classes=classes,
        samples=sum(table["samples"]),
        bytes=sum(table["bytes"]),
        image_bytes=sum(receipt.image_bytes for receipt in receipts),
        shards=len(shards),
        digest=manifest.digest(classes, table["sha256"], {}),
        build={},
    )
    manifest.write_info(store, info)
    return folder


def damage(folder: Path, places: list[tuple[int, int]]) -> None:
    """Overwrite images, (shard, index) of each, inside the tars, as a failing disk would."""
    dataset = Dataset.open(folder)
    for shard, index in places:
        rows = dataset.rows(shard)
        with open(folder / manifest.shard_path(shard), "r+b") as tar:
            tar.seek(int(rows.offset[index]))
            tar.write(bytes(int(rows.size[index])))
