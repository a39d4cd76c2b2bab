"""A disk that is really full: a small file system of its own, where this process may mount one, or a limit of files."""

import resource
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from shards.errors import PatchmillError
from tests.disks import small_disk

pytestmark = pytest.mark.usefixtures("alone")
COUNT = 200_000


def write(folder: Path, samples: int, size: int = 0) -> Path:
    pieces = [("weight", "a", 0, torch.arange(float(COUNT)))]
    return checkpoint.save(folder, samples, pieces, {"a": (COUNT,)}, {}, size=size)


@pytest.fixture
def checkpoints(tmp_path):
    """A folder to be made on a disk of 3 MB."""
    with small_disk(tmp_path / "disk", "3m") as disk:
        yield disk / "checkpoints"


def test_a_full_disk_is_one_line_and_what_was_saved_stays(checkpoints):
    first = [write(checkpoints, samples) for samples in (8, 16, 24)]
    with pytest.raises(PatchmillError, match=r"cannot write checkpoint .*000032: .*(space|ENOSPC).*; make room"):
        write(checkpoints, 32)
    assert not list(checkpoints.glob(".*"))  # what did not fit is gone
    with pytest.raises(
        PatchmillError, match=r"a checkpoint in .* takes 0.0008 GB, and .* GB of its disk are free; make room"
    ):
        write(checkpoints, 32, size=4 * COUNT)
    assert checkpoint.newest(checkpoints).path == first[-1]
    for each in first:
        Checkpoint(each).verify()
    shutil.rmtree(first[0])
    Checkpoint(write(checkpoints, 32, size=4 * COUNT)).verify()


def test_a_write_that_fails_is_one_line_and_what_was_saved_stays(tmp_path):
    first, limits = write(tmp_path, 8), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (COUNT, limits[1]))
    try:
        with pytest.raises(PatchmillError, match=r"cannot write checkpoint .*000016: .*File too large.*; make room"):
            write(tmp_path, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.newest(tmp_path).path == first


def test_a_pointer_to_nowhere_is_not_needed(tmp_path):
    first = write(tmp_path, 8)
    for text in (b"samples-000000000099\n", b"", b"../elsewhere\n", b"\xff\xfe", b"samples\0", b"x" * 5000):
        (tmp_path / "latest").write_bytes(text)
        assert checkpoint.pointer(tmp_path, "latest") is None
        assert checkpoint.newest(tmp_path).path == first
    (tmp_path / "latest").unlink()
    assert checkpoint.newest(tmp_path).path == first
