"""One shard: what it is to hold, its tar written by webdataset, and its receipt."""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shards import manifest
from shards.atomic import whole_file
from shards.decode import DecodeError, decode
from shards.errors import UserError
from shards.header import BrokenImageError, read_header
from shards.manifest import Receipt
from shards.sources.folder import ImageFile

# Settings of webdataset's TarWriter that keep times and users out of the bytes, and allow long names.
TAR = {"mtime": 0, "user": "patchmill", "group": "patchmill", "mode": 0o444, "format": "GNU_FORMAT"}


@dataclass(frozen=True)
class Job:
    """One shard to write: these images of ``source``, in this order, into the data set ``folder``."""

    source: Path
    folder: Path
    shard: int
    images: list[ImageFile]

    @property
    def tar(self) -> Path:
        """Where the tar goes."""
        return self.folder / manifest.shard_path(self.shard)

    @property
    def samples(self) -> Path:
        """Where the sample table goes, with the receipt in it."""
        return self.folder / manifest.samples_path(self.shard)

    def plan(self) -> str:
        """Return the hex digest of what this shard is to hold."""
        images = [[image.key, image.path, image.label, image.size] for image in self.images]
        return hashlib.sha256(json.dumps([TAR, images]).encode()).hexdigest()


def finished(job: Job) -> Receipt | None:
    """Return the receipt of this shard if an earlier build wrote it from the same files, unchanged since."""
    try:
        receipt, tar = manifest.read_receipt(job.samples), job.tar.stat()
    except (OSError, ValueError, KeyError, TypeError):  # missing, damaged or written by something else
        return None
    unchanged = all(image.changed <= tar.st_mtime_ns for image in job.images)
    return receipt if receipt.plan == job.plan() and receipt.bytes == tar.st_size and unchanged else None


def write_shard(job: Job) -> Receipt:
    """Write the tar, then the sample table with the receipt; broken images are left out and listed in it.

    Raises:
        UserError: An image cannot be read, or is no longer what the plan says.
    """
    from webdataset import TarWriter  # here, because it imports torch: only who writes waits for that

    job.samples.unlink(missing_ok=True)  # an old receipt must not vouch for the new tar
    rows: dict[str, list] = {name: [] for name in manifest.SAMPLES_SCHEMA.names}
    rejected = []
    with whole_file(job.tar) as partial:
        with open(partial, "wb") as file:
            hashed = _HashedFile(file)
            with TarWriter(hashed, encoder=False, **TAR) as tar:
                for image in job.images:
                    data = _read(job.source / image.path, image.size)
                    try:
                        header = read_header(data)
                        decode(data, image.path)  # damage inside the compressed data shows in no header
                    except BrokenImageError as error:
                        rejected.append((image.path, str(error)))
                        continue
                    except DecodeError as error:
                        rejected.append((image.path, str(error.__cause__)))
                        continue
                    tar.write({"__key__": image.key, header.format: data, "cls": str(image.label).encode()})
                    row = (image.key, len(data), header.format, [image.label], header.width, header.height)
                    for name, value in zip(("key", "size", "format", "labels", "width", "height"), row, strict=True):
                        rows[name].append(value)
                    rows["sha256"].append(hashlib.sha256(data).digest())
            written = file.tell()
        with tarfile.open(partial, "r:") as tar:  # names are longer than a header block now and then: never guess
            rows["offset"] = [member.offset_data for member in tar if not member.name.endswith(".cls")]
    receipt = Receipt(
        sha256=hashed.digest.hexdigest(),
        bytes=written,
        samples=len(rows["key"]),
        image_bytes=sum(rows["size"]),
        plan=job.plan(),
        rejected=rejected,
    )
    manifest.write_samples(job.samples, rows, receipt)
    return receipt


class _HashedFile:
    """A file to write to that hashes what goes through it."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _read(path: Path, size: int) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend or remove it, then build again") from error
    if len(data) != size:
        raise UserError(f"{path} changed while the build ran; build again when the source is at rest")
    return data
