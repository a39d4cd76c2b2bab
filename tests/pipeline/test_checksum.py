"""Checksums of a checkpoint's files: the one that is written, and that of older checkpoints."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_hexdigest

from pipeline import checkpoint, checksum
from pipeline.checkpoint import BrokenCheckpointError, Checkpoint
from tests.pipeline.indices import with_changes

VALUES = torch.arange(100_000.0)


@pytest.fixture
def path(tmp_path, alone) -> Path:
    return checkpoint.save(tmp_path, 8, [("weight", "a", 0, VALUES)], {"a": VALUES.shape}, {})


def as_format_1(path: Path) -> Path:
    """Make of a checkpoint what Patchmill wrote before it had any checksum but SHA-256."""
    index = json.loads((path / "checkpoint.json").read_text())
    del index["xxh3_128"]
    index["format_version"] = 1
    index["files"] = [
        {
            "name": file["name"], "bytes": file["bytes"],
            "sha256": hashlib.sha256((path / file["name"]).read_bytes()).hexdigest(),
        }
        for file in index["files"]
    ]  # fmt: skip
    (path / "checkpoint.json").write_text(json.dumps(index, indent=1))
    return path


def test_it_is_the_one_that_others_compute():
    assert checksum.begin().hexdigest() == "99aa06d3014798d86001c324468d497f"  # XXH3's own, of nothing


def test_the_index_has_that_of_the_values_and_then_of_the_header(path):
    (file,) = json.loads((path / "checkpoint.json").read_text())["files"]
    content = (path / file["name"]).read_bytes()
    front = len(content) - VALUES.nbytes
    assert file == {
        "name": "rank-00000.safetensors", "bytes": len(content),
        "xxh3_128": xxh3_128_hexdigest(content[front:] + content[:front]),
    }  # fmt: skip


@pytest.mark.parametrize("at", [0, 7, 100, -1])  # the header's length, lengths beyond the file, header and values
@pytest.mark.parametrize("old", [False, True])
def test_a_changed_byte_is_found_in_new_checkpoints_and_in_old_ones(path, old, at):
    if old:
        as_format_1(path)
    found = Checkpoint(path)
    assert ("sha256" in found.files[0]) == old
    found.verify()
    assert torch.equal(found.read("weight", "a", 0, len(VALUES)), VALUES)
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match="does not have the checksum it was written with"):
        found.verify()


def test_a_file_without_a_checksum_that_is_known_is_broken(path):
    (file,) = json.loads((path / "checkpoint.json").read_text())["files"]
    file["crc"] = file.pop("xxh3_128")
    (path / "checkpoint.json").write_text(with_changes(path / "checkpoint.json", {"files": [file]}))
    with pytest.raises(BrokenCheckpointError, match=r"no readable checkpoint\.json: 'xxh3_128'"):
        Checkpoint(path)
