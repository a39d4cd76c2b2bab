"""What reads tars, images and manifests."""

import io
import json
import struct
import zipfile
import zlib
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards import manifest
from shards.augment import CenterCrop, InceptionCrop, Resize, transform_encoded
from shards.dataset import Dataset
from shards.decode import decode
from shards.droplist import read_exclude
from shards.encode import Encoding
from shards.header import BrokenImageError, read_header
from shards.jpegcrop import decode_part
from shards.labels import ClassNames, LabelRule
from shards.orientation import read_orientation
from shards.tarindex import Job, Reading, finished, index_tar
from shards.tarstream import Tar, read_samples
from shards.verify import verify
from tests.fuzz.mutate import damaged, damaged_tree
from tests.fuzz.target import Target

# ---- tars


def _read_tar(data: bytes, folder: Path) -> None:
    """Index a tar, stream it, and read by the index what was found in it."""
    (folder / "x.tar").write_bytes(data)
    job = Job(str(folder), "x.tar", str(folder / "out"), 0, Reading(LabelRule()))
    receipt = index_tar(job)
    if isinstance(receipt, str):
        assert "\n" not in receipt, f"several lines: {receipt!r}"
    else:
        finished(job)
    list(read_samples(Tar("x.tar", lambda: io.BytesIO(data)), ClassNames(["a", "b"]), "any"))


def _change_tar(data: bytes, rng: Random) -> bytes:
    """Change bytes; half the time in a header, whose checksum is then made right."""
    if rng.random() < 0.4:
        return damaged(data, rng, (b"ustar\x0000", b"ustar  \0", b"\x80\0\0\0", b"\xff" * 8, bytes(512)))
    found = bytearray(data)
    starts = [at for at in range(0, len(found) - 511, 512) if found[at + 257 : at + 262] == b"ustar"]
    for at in rng.choices(starts or [0], k=rng.choice((1, 1, 2))):
        header = bytearray(
            damaged(bytes(found[at : at + 512]), rng, (b"x", b"g", b"L", b"K", b"S", b"5", b"2", b"\x80"))
        )
        header = (header + bytes(512))[:512]
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        found[at : at + 512] = header
    return bytes(found)


# ---- images


def _read_image(data: bytes, folder: Path) -> None:
    """Do with an image what building, indexing and training do."""
    header, rng = None, np.random.default_rng(len(data))
    read_orientation(data)
    try:
        header = read_header(data)
        assert 1 <= header.orientation <= 8
    except BrokenImageError:
        pass
    box = tuple(int(each) for each in rng.integers(-2, 40, 4))
    decode_part(data, *box, int(rng.choice([1, 2, 4, 8])))
    for transform in (InceptionCrop(8, shrink=True), Resize(8), CenterCrop(8)):
        assert transform_encoded(transform, data, "key", (0, 0, len(data))).shape == (8, 8, 3)
    image = decode(data, "key")
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
    if header:
        Encoding(resize_short=8).apply(data, header, "key")


def _change_image(data: bytes, rng: Random) -> bytes:
    if data[:4] == b"\x89PNG" and rng.random() < 0.7:
        return _change_png(data, rng)
    markers = [bytes([0xFF, marker]) for marker in (0xD8, 0xD9, 0xDA, 0xC0, 0xC2, 0xC4, 0xDD, 0xE1, 0xFF)]
    tokens = (*markers, b"VP8X", b"VP8L", b"ANMF", b"EXIF")
    return damaged(data, rng, tokens, rng.choice((None, 64, 700)))


def _change_png(data: bytes, rng: Random) -> bytes:
    """Change chunks, and make their checksums right."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice((1, 1, 2))):
        place = rng.randrange(len(chunks))
        kind, content = chunks[place]
        match rng.randrange(6):
            case 0:
                chunks.insert(place, rng.choice(chunks))
            case 1:
                del chunks[place]
            case 2:
                extra = rng.choice([b"tRNS", b"acTL", b"fcTL", b"fdAT", b"zTXt", b"iTXt", b"iCCP", b"PLTE", b"eXIf"])
                chunks.insert(place, (extra, rng.choice([content, zlib.compress(bytes(100)), bytes(range(30))])))
            case _:
                chunks[place] = kind, damaged(content, rng)
        if not chunks:
            break
    body = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return data[:8] + b"".join(body)


# ---- manifests

SHARD = manifest.SHARDS, manifest.samples_path(0), manifest.exclude_path("v1")


def _read_manifest(data: bytes, folder: Path) -> None:
    """Open a data set, which comes packed, and read all of it in every way there is."""
    for name, content in unpacked(data).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    errors = []
    for how in (_by_samples, _by_list, _by_verify):
        try:
            how(folder)
        except Target(_by_list, _change_manifest, 0).contract as error:  # the others have a look nevertheless
            errors.append(error)
    if errors:
        raise errors[0]


def _by_samples(folder: Path) -> None:
    dataset = Dataset.open(folder, exclude="v1" if (folder / SHARD[2]).exists() else None)
    dataset.order(seed=0)
    for shard in range(min(len(dataset.paths), 5)):
        dataset.read_many(shard, 0, 5)
    for index in range(min(len(dataset), 5)):
        dataset[index]
    Dataset.open(folder, subset=1)


def _by_list(folder: Path) -> None:
    read_exclude(folder, "v1")
    info = manifest.parse_info((folder / manifest.DATASET).read_bytes(), str(folder))
    if info.build.get("source") == "index":
        Reading.of(info)


def _by_verify(folder: Path) -> None:
    verify(folder, decode=True, workers=1)


def _change_manifest(data: bytes, rng: Random) -> bytes:
    """Change one file of a data set: its bytes, its values, or a table's columns."""
    files = unpacked(data)
    path = rng.choice([manifest.DATASET, manifest.DATASET, *SHARD, *SHARD])
    if rng.random() < 0.25:
        files[path] = damaged(files[path], rng)
    elif path == manifest.DATASET:
        files[path] = json.dumps(damaged_tree(json.loads(files[path]), rng)).encode()
    else:
        files[path] = _change_table(files[path], rng)
    if rng.random() < 0.5:
        _agree(files)
    return pack(files)


def _change_table(data: bytes, rng: Random) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    if b"receipt" in (table.schema.metadata or {}) and rng.random() < 0.3:
        receipt = json.dumps(damaged_tree(json.loads(table.schema.metadata[b"receipt"]), rng))
        table = table.replace_schema_metadata({"receipt": receipt})
    columns = {name: table[name] for name in table.column_names}
    name, old = rng.choice(list(columns.items()))
    others = [
        [None] * len(table),
        ["x"] * len(table),
        [-1] * len(table),
        [2**40] * len(table),
        [0.5] * len(table),
        [[1, None]] * len(table),
        [b"1"] * len(table),
        old.to_pylist()[::-1],
        [old[0].as_py()] * len(table),
        [*old.to_pylist()[:-1], None],
        [*old.to_pylist()[:-1], rng.choice([0, -1, 2**31 - 1, "", "../x"])],
    ]
    try:
        columns[name] = pa.array(rng.choice(others), rng.choice([old.type, None]))
    except (pa.ArrowException, OverflowError, TypeError):
        del columns[name]
    made = pa.table(columns, metadata=table.schema.metadata)
    if rng.random() < 0.2:
        made = made.slice(0, rng.randrange(len(made) + 1))
    file = io.BytesIO()
    pq.write_table(made, file)
    return file.getvalue()


def _agree(files: dict[str, bytes]) -> None:
    """Let the digest in dataset.json be that of what is there, so that it is believed."""
    try:
        told = json.loads(files[manifest.DATASET])
        shards = manifest.read_table(files[manifest.SHARDS])["sha256"].to_pylist()
        told["digest"] = manifest.digest(told["classes"], shards, told["build"])
        files[manifest.DATASET] = json.dumps(told).encode()
    except Exception:  # noqa: BLE001 (it is too far gone)
        return


def pack(files: dict[str, bytes]) -> bytes:
    """Return the files of a folder as one input."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """Return the files of ``pack``."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


TARGETS = {
    "tar": Target(_read_tar, _change_tar, 600),
    "image": Target(_read_image, _change_image, 1500, room=3 << 29),  # one of the most pixels, and a copy
    "manifest": Target(_read_manifest, _change_manifest, 200, room=1 << 29),  # 64 MiB a thread are only set apart
}
