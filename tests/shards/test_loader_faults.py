"""A loader over a network and servers that fail: the very same batches, or one clear error."""

import hashlib
import json
import shutil
from itertools import islice

import numpy as np
import pytest

from shards.augment import InceptionCrop
from shards.build import build
from shards.dataset import ROW_COLUMNS, Dataset
from shards.errors import PatchmillError, UserError
from shards.index import index
from shards.loader import Loader
from shards.objects import MissingError, ShortError
from shards.storesettings import StoreSettings
from tests.shards.datasets import damage
from tests.shards.foreign import replace_with_same_size, write_webdataset
from tests.shards.images import encode
from tests.shards.servers import serve_faults

SHUFFLE = {"lanes": 4, "chunk": 4, "block": 8}
BATCHES = 10  # of 12: more than an epoch of 90
QUICK = StoreSettings(timeout_seconds=0.25, retry_seconds=20)
IMPATIENT = StoreSettings(timeout_seconds=0.2, retry_seconds=0.3)


@pytest.fixture
def server(ninety):
    with serve_faults(ninety) as server:
        yield server


def batches(dataset, count=BATCHES, **options):
    """Return a digest of each batch."""
    loader = Loader(dataset, global_batch=12, transform=InceptionCrop(8), **SHUFFLE, **options)
    return [
        hashlib.sha256(batch.images.tobytes() + batch.labels.tobytes() + batch.positions.tobytes()).hexdigest()
        for batch in islice(loader, count)
    ]


@pytest.fixture(scope="module")
def expected(ninety):
    return batches(Dataset.open(ninety))


TRANSIENT = ["error", "reset", "silence", "half body", "reset inside", "stall", "wrong length"]


def read_tables(dataset):
    for shard in range(len(dataset.shard_sizes)):
        dataset.rows(shard)


@pytest.mark.parametrize("fault", TRANSIENT)
def test_bursts_of_faults_change_no_batch(server, expected, fault):
    dataset = Dataset.open(server.url, settings=QUICK)
    if fault == "wrong length":  # of a whole table nobody can tell but by its content, which is the next test
        read_tables(dataset)
    server.fault, server.good, server.bad = fault, 8, 6  # among tables and chunks; one request alone survives so many
    assert batches(dataset) == expected
    assert server.bad == 0


def test_bits_that_a_network_turns_change_no_batch(server, expected):
    dataset = Dataset.open(server.url, settings=QUICK)
    read_tables(dataset)
    server.fault, server.good, server.bad = "flip", 2, 6
    assert batches(dataset) == expected
    assert server.bad == 0
    assert dataset.retries > 0


def test_bits_turned_on_the_way_from_a_server_that_sends_no_parts_change_no_batch(server, expected):
    server.ranges = False
    dataset = Dataset.open(server.url, settings=QUICK)
    read_tables(dataset)
    dataset.tars.read_range(dataset.paths[0], 0, 1)  # now it asks for no parts any more, whose answers it ignores
    server.fault, server.good, server.bad = "flip", 1, 3
    assert batches(dataset) == expected
    assert server.bad == 0
    assert dataset.retries > 0


def test_bits_that_a_network_turns_each_time_are_one_clear_error(server):
    dataset = Dataset.open(server.url, settings=QUICK)
    read_tables(dataset)
    server.fault, server.bad = "flip", 10**9
    with pytest.raises(PatchmillError, match=rf"{server.url}/shards/\d+\.tar comes otherwise each time.*the network"):
        batches(dataset)


def test_bits_that_a_network_turns_in_tables_change_nothing(server, ninety):
    dataset = Dataset.open(server.url, settings=QUICK)
    server.fault, server.bad = "flip", 6
    tables = [dataset.table(shard, ROW_COLUMNS) for shard in range(len(dataset.paths))]
    assert server.bad == 0
    assert tables == [Dataset.open(ninety).table(shard, ROW_COLUMNS) for shard in range(len(dataset.paths))]


def test_bits_that_a_network_turns_in_the_description_change_nothing(server, ninety):
    server.fault, server.bad = "flip", 3
    assert Dataset.open(server.url, settings=QUICK).mean_bytes == Dataset.open(ninety).mean_bytes
    server.bad = 10**9
    with pytest.raises(PatchmillError, match=r"dataset\.json comes otherwise each time, 11 times; check the network"):
        Dataset.open(server.url, settings=QUICK)


def test_a_table_that_comes_too_short_is_an_error(server):
    dataset = Dataset.open(server.url, settings=QUICK)
    server.fault, server.bad = "wrong length", 10**9  # the same each time: it is so on the server
    with pytest.raises(UserError, match=rf"{server.url}/manifest/samples/\d+\.parquet is damaged"):
        batches(dataset)


@pytest.mark.parametrize("fault", [*TRANSIENT, "short range"])
def test_faults_that_stay_are_one_clear_error(server, expected, fault):
    dataset = Dataset.open(server.url, settings=IMPATIENT)
    read_tables(dataset)
    server.fault, server.bad = fault, 10**9
    with pytest.raises(
        PatchmillError, match=rf"cannot read {server.url}/shards/\d+\.tar, bytes \d+ to \d+: "
    ) as caught:
        batches(dataset)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    server.bad = 0
    assert batches(dataset) == expected  # with the same data set, once the server is well


def test_a_server_without_ranges_gives_the_same_batches(server, expected, capfd):
    server.ranges, server.fault, server.good, server.bad = False, "half body", 5, 2
    assert batches(Dataset.open(server.url, settings=QUICK)) == expected
    wholes = [path for path in server.paths if path.endswith(".tar")]
    assert len(set(wholes)) == 7
    # Each once; but what is on the way when the first answer shows how the server is comes twice, and two broke off.
    assert len(wholes) <= 7 + 16 + 2
    assert capfd.readouterr().err.count("sends no parts of files") == 1


def test_a_missing_shard_is_named(ninety, tmp_path):
    shutil.copytree(ninety, tmp_path / "set")
    (tmp_path / "set/shards/000003.tar").unlink()
    with serve_faults(tmp_path / "set") as server:
        with pytest.raises(MissingError, match=rf"no object {server.url}/shards/000003\.tar, bytes \d+ to \d+"):
            batches(Dataset.open(server.url, settings=QUICK))
        assert server.requests < 100  # nobody asks again for what is not there


def test_a_truncated_tar_is_named(ninety, tmp_path):
    shutil.copytree(ninety, tmp_path / "set")
    tar = tmp_path / "set/shards/000005.tar"
    tar.write_bytes(tar.read_bytes()[:7000])
    with (
        serve_faults(tmp_path / "set") as server,
        pytest.raises(ShortError, match=rf"{server.url}/shards/000005\.tar ends before byte \d+ .*cut short"),
    ):
        batches(Dataset.open(server.url, settings=QUICK))


def test_a_tar_that_changed_after_indexing_is_named(tmp_path):
    write_webdataset(tmp_path / "set", samples=60)
    index(tmp_path / "set")
    replace_with_same_size(tmp_path / "set/set-000002.tar")
    with (
        serve_faults(tmp_path / "set") as server,
        pytest.raises(UserError, match=rf"{server.url}/set-000002\.tar is not the tar that .* knows.*index them again"),
    ):
        batches(Dataset.open(server.url, settings=QUICK))


def test_every_stand_in_of_corrupt_jpegs_is_in_the_quarantine(tmp_path):
    for number in range(300):
        path = tmp_path / f"images/{number % 3}/{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    build(tmp_path / "images", tmp_path / "set", shard_samples=50, workers=1)
    with serve_faults(tmp_path / "set") as server:

        def run(url, rank=0, world_size=1, quarantine=None):
            loader = Loader(
                Dataset.open(url), global_batch=12, transform=InceptionCrop(8), rank=rank, world_size=world_size,
                quarantine=quarantine, **SHUFFLE,
            )  # fmt: skip
            rows = {}
            for batch in islice(loader, 25):
                for image, label, position in zip(*batch, strict=True):
                    rows[int(position)] = (image.tobytes(), int(label))
            return rows, loader

        whole, loader = run(tmp_path / "set")
        broken = [(0, 7), (2, 49), (4, 20)]  # 1 %
        damage(tmp_path / "set", broken)
        dataset = Dataset.open(tmp_path / "set")
        server.fault, server.good, server.bad = "error", 30, 10  # the network is not to be mistaken for the data
        ranks = [run(server.url, rank, 2, tmp_path / "quarantine.jsonl") for rank in range(2)]

    rows = ranks[0][0] | ranks[1][0]
    _, shard, place = loader.order.locate(np.arange(300))
    replaced = {p for p in range(300) if (shard[p], place[p]) in broken}
    assert {p for p in range(300) if rows[p] != whole[p]} == replaced
    assert sum(loader.replaced for _, loader in ranks) == len(replaced) == 3
    assert rows == run(tmp_path / "set")[0]
    listed = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((each["shard"], each["index"]) for each in listed) == broken
    assert {each["key"] for each in listed} == {dataset.read(*where).key for where in broken}
