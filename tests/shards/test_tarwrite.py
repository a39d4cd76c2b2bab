"""The tar writer against webdataset's own."""

import hashlib
import io
import tarfile
import zlib

import webdataset as wds

from shards.tarwrite import TAR, TarWriter

SAMPLES = [
    ("a/b", {"jpg": b"x" * 511, "cls": b"3"}),
    ("n01440764/n01440764_10026", {"jpg": bytes(range(256)) * 512, "cls": b"12"}),
    ("ü" * 60 + "/" + "long " * 40, {"png": b"", "json": b"{}"}),  # longer than a header block holds
    ("k" * 95, {"webp": b"y" * 513}),  # 100 characters: just fits
    ("k" * 96, {"webp": b"y" * 1}),  # just does not
    ("k" * 97, {"webp": b"y" * 512, "txt": "ß".encode()}),
]


def write(samples):
    file = io.BytesIO()
    writer = TarWriter(file)
    members = {}
    for key, parts in samples:
        for extension in sorted(parts):
            members[f"{key}.{extension}"] = writer.add(f"{key}.{extension}", parts[extension])
    writer.close()
    return file.getvalue(), writer, members


def test_bytes_are_those_of_webdataset():
    for samples in (SAMPLES, [], SAMPLES[:1] * 40):
        file = io.BytesIO()
        with wds.TarWriter(file, encoder=False, **TAR) as theirs:
            for key, parts in samples:
                theirs.write({"__key__": key, **parts})
        data, writer, _ = write(samples)
        assert data == file.getvalue()
        assert writer.sha256.hexdigest() == hashlib.sha256(data).hexdigest()
        assert writer.bytes == len(data)


def test_members_are_where_it_says():
    data, _, members = write(SAMPLES)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {info.name: info.offset_data for info in tar} == {name: place.offset for name, place in members.items()}
    for _, (offset, header) in members.items():
        assert header == zlib.crc32(data[offset - 512 : offset])
