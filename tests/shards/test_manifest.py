"""Files of the manifest: what is written is what is read, and nothing but the data decides the bytes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards import manifest
from shards.errors import UserError
from shards.manifest import Info, Receipt
from shards.store import open_store

ROOT = Path(__file__).parents[2]
ROWS = {
    "key": ["a/0", "b/1"],
    "offset": [1536, 4608],
    "size": [1000, 2000],
    "format": ["jpg", "png"],
    "labels": [[0], [1, 2]],
    "weights": [None, [0.25, 0.75]],
    "width": [10, 20],
    "height": [30, 40],
    "orientation": [1, 6],
    "member": [0, 2**32 - 1],
    "xxh128": [bytes(range(16)), bytes(16)],
}
RECEIPT = Receipt("ab" * 32, 10240, 2, 3000, "cd" * 32, [("c/x.jpg", "empty file")])
INFO = Info(["a", "b"], 2, 10240, 3000, 1, "ef" * 32, {"seed": 0})


def test_sample_table_and_receipt_round_trip(tmp_path):
    path = tmp_path / "000000.parquet"
    store = open_store(tmp_path)
    manifest.write_samples(store, path.name, ROWS, RECEIPT)
    table = manifest.read_table(path.read_bytes())
    assert table.schema.remove_metadata() == manifest.SAMPLES_SCHEMA
    assert table.to_pydict() == ROWS
    assert manifest.read_receipt(store, path.name) == RECEIPT
    assert manifest.read_table(path.read_bytes(), columns=["size"]).to_pydict() == {"size": [1000, 2000]}


def test_no_thread_of_arrow_keeps_the_bytes_of_a_table_when_it_is_read(tmp_path):
    """It may let go of them while the interpreter is taken apart, and the process aborts."""
    manifest.write_samples(open_store(tmp_path), "000000.parquet", ROWS, RECEIPT)
    program = (
        "import os; from pathlib import Path; from shards import manifest\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "assert len(manifest.read_table(Path('000000.parquet').read_bytes())) == 2\n"
        "print(set(os.listdir('/proc/self/task')) - before)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert done.stdout == b"set()\n", done.stderr


def test_info_round_trips_and_is_the_same_every_time(tmp_path):
    manifest.write_info(open_store(tmp_path / "one", create=True), INFO)
    manifest.write_info(open_store(tmp_path / "two", create=True), INFO)
    data = (tmp_path / "one" / manifest.DATASET).read_bytes()
    assert data == (tmp_path / "two" / manifest.DATASET).read_bytes()
    assert manifest.parse_info(data, "url") == INFO


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"schema_version": 2}', "schema version 2"),
        (b'{"schema_ver', "damaged"),
        (b'{"schema_version": 3}', "damaged"),
        (b"[]", "damaged"),
    ],
)
def test_bad_info_is_one_line_for_the_user(data, message):
    with pytest.raises(UserError, match=f"url.*{message}|{message}.*url"):
        manifest.parse_info(data, "url")


def test_digest_sees_classes_shards_and_their_order():
    base = manifest.digest(["a", "b"], ["1", "2"], {})
    others = [
        (["b", "a"], ["1", "2"]),
        (["a", "b"], ["2", "1"]),
        (["a", "b"], ["1"]),
        (["a", "b", "1"], ["2"]),
    ]
    assert base == manifest.digest(["a", "b"], ["1", "2"], {})
    assert base not in [manifest.digest(*other, {}) for other in others]
    shard, index = np.array([0, 1], np.int32), np.array([5, 6], np.int32)
    dropped = manifest.digest_with_exclude(base, shard, index)
    assert dropped == manifest.digest_with_exclude(base, shard, index)
    assert len({base, dropped, manifest.digest_with_exclude(base, index, shard)}) == 3


def test_a_sample_costs_little_more_than_its_hashes(tmp_path):
    rng = np.random.default_rng(0)
    count = 5000
    size = rng.lognormal(11.5, 0.5, count).astype(np.int64)
    rows = {
        "key": [f"n{label:08d}/n{label:08d}_{label}" for label in rng.integers(0, 20_000, count).tolist()],
        "offset": np.cumsum(size + 1024),
        "size": size,
        "format": ["jpg"] * count,
        "labels": rng.integers(0, 20_000, (count, 1)).tolist(),
        "weights": [None] * count,
        "width": [500] * count,
        "height": [375] * count,
        "orientation": [1] * count,
        "member": rng.integers(0, 1 << 32, count, dtype=np.uint32),
        "xxh128": [rng.bytes(16) for _ in range(count)],
    }
    path = tmp_path / "000000.parquet"
    manifest.write_samples(open_store(tmp_path), path.name, rows, RECEIPT)
    assert manifest.read_table(path.read_bytes()).to_pydict() == pa.table(rows, manifest.SAMPLES_SCHEMA).to_pydict()
    assert path.stat().st_size / count < 36 + 18  # 36 are hash and checksum, which do not compress
