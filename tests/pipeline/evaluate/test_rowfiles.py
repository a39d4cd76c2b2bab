"""Tables that real ranks write together."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.rowfiles import RowFiles
from tests.ranks import run_on_ranks

WORKER = Path(__file__).parent / "worker_rowfiles.py"


def test_each_rank_writes_its_rows_and_reads_those_of_all(tmp_path):
    assert run_on_ranks(WORKER, 3, tmp_path / "made") == [{"a": True, "b": True}] * 3


def test_what_is_read_cannot_be_written(tmp_path, alone):
    files = RowFiles(tmp_path / "made", 2, {"a": 1})
    files.write("a", 0, np.array([[1.0], [2.0]]))
    (table,) = files.tables().values()
    assert table.tolist() == [[1.0], [2.0]]
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 3
