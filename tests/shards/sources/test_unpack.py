"""What is unpacked belongs to the source as it is now, whatever was left by tries that failed."""

import pyarrow as pa
import pytest

from shards.objects import Entry
from shards.sources.unpack import unpack

ONE, OTHER = Entry("x.tar.gz", 10, 1), Entry("x.tar.gz", 10, 2)


def maker(content, table=None):
    def make(file):
        file.write(content)
        return pa.table({"n": [len(content)]}) if table is None else table

    return make


def never(file):
    raise AssertionError("unpacked already")


def test_unpacked_once_for_each_state_of_the_source(tmp_path):
    first = unpack(tmp_path, "a/x", ONE, maker(b"one"))
    assert unpack(tmp_path, "a/x", ONE, never).equals(first)
    assert unpack(tmp_path, "a/x", OTHER, maker(b"other")).to_pydict() == {"n": [5]}
    assert (tmp_path / "a/x.bin").read_bytes() == b"other"


def test_a_try_that_fails_between_bytes_and_table_vouches_for_nothing(tmp_path):
    """A link may point to one file, then another, then the first again: as large, and no newer."""
    unpack(tmp_path, "x", ONE, maker(b"111"))
    no_parquet = pa.table({"n": pa.array([(1, 2, 3)], pa.month_day_nano_interval())})
    with pytest.raises(pa.ArrowNotImplementedError):
        unpack(tmp_path, "x", OTHER, maker(b"222", no_parquet))
    assert (tmp_path / "x.bin").read_bytes() == b"222"
    unpack(tmp_path, "x", ONE, maker(b"111"))
    assert (tmp_path / "x.bin").read_bytes() == b"111"
