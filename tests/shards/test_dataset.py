"""An opened data set: lazily read rows, samples, drop lists."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import dataset as dataset_module
from shards import manifest
from shards.augment import Resize
from shards.build import build
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.loader import Loader
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.images import make_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), classes=3, each=10)


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    build(source, folder, shard_samples=7, workers=1)
    return folder


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built, tmp_path / "copy")


def original(source, sample):
    """Return the bytes of the file that a sample was made from."""
    folder, *_, name = sample.key.split("/")
    found = [p for p in source.rglob("*.*") if p.is_file() and p.stem.replace(".", "_") == name]
    return next(p for p in found if p.relative_to(source).parts[0].replace(".", "_") == folder).read_bytes()


def test_samples_are_the_original_files(built, source):
    dataset = Dataset.open(built)
    samples = [dataset[i] for i in range(len(dataset))]
    assert len(samples) == 30
    assert len({sample.key for sample in samples}) == 30
    assert dataset.classes == ["class.0", "class.1", "class.2"]
    for sample in samples:
        assert sample.image == original(source, sample)
        assert sample.labels == (int(sample.key[len("class_")]),)
    assert {sample.format for sample in samples} == {"jpg", "png", "webp"}
    assert dataset.mean_bytes == pytest.approx(np.mean([len(sample.image) for sample in samples]))
    assert dataset[-1] == samples[-1]
    with pytest.raises(IndexError):
        dataset[30]


def test_every_way_to_read_gives_the_same(built):
    dataset = Dataset.open(built.as_uri())
    assert dataset.shard_sizes.tolist() == [7, 7, 7, 7, 2]
    assert dataset.shard_sizes.dtype == np.int64
    assert dataset.read(2, 3) == dataset[17] == dataset.read_many(2, 1, 5)[2]
    rows = dataset.rows(2)
    assert (len(rows), rows.key[3], rows.format[3]) == (7, dataset[17].key, dataset[17].format)
    assert rows.size[3] == len(dataset[17].image)


def test_threads_share_it(built):
    dataset = Dataset.open(built)
    alone = [dataset[i] for i in range(30)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(dataset.__getitem__, list(range(30)) * 10)) == alone * 10


def test_opening_reads_nothing_of_the_samples(copy, monkeypatch):
    write_exclude(copy, "v1", [(0, 1, "test image")])
    reads = []
    real_open = dataset_module.open_store

    def open_and_record(url, settings):
        store = real_open(url, settings=settings)
        for name in ("read", "read_range", "read_ranges"):
            call = getattr(store, name)
            monkeypatch.setattr(store, name, lambda path, *a, call=call: (reads.append(path), call(path, *a))[1])
        return store

    monkeypatch.setattr(dataset_module, "open_store", open_and_record)
    dataset = Dataset.open(copy, exclude="v1")
    assert len(dataset) == 29
    assert sorted(reads) == [
        "manifest/dataset.json",
        "manifest/exclude/v1.parquet",
        "manifest/shards.parquet",
    ]
    dataset.rows(3)
    dataset.rows(3)
    assert reads[3:] == ["manifest/samples/000003.parquet"]  # once, and only the shard asked for


def test_drop_list_leaves_samples_out(copy):
    whole = Dataset.open(copy)
    write_exclude(copy, "v1", [(4, 1, "blurred"), (1, 0, "in the test set"), (1, 6, "in the test set"), (4, 0, "x")])
    dataset = Dataset.open(copy, exclude="v1")
    assert dataset.shard_sizes.tolist() == [7, 5, 7, 7, 0]
    kept = [whole.read(1, raw) for raw in (1, 2, 3, 4, 5)]
    assert [dataset.read(1, i) for i in range(5)] == kept
    assert dataset.read_many(1, 0, 5) == kept
    assert len(dataset.rows(4)) == 0
    assert [dataset[i] for i in range(26)] == [
        *map(whole.__getitem__, range(7)),
        *kept,
        *map(whole.__getitem__, range(14, 28)),
    ]
    assert dataset.exclude_versions() == ["v1"]


def test_digest_covers_the_dropped_samples(copy, built):
    write_exclude(copy, "one", [(0, 0, "a")])
    write_exclude(copy, "same", [(0, 0, "another reason")])
    write_exclude(copy, "other", [(0, 1, "a")])
    write_exclude(copy, "none", [])
    digests = {name: Dataset.open(copy, exclude=name).digest for name in (None, "one", "same", "other")}
    assert digests[None] == Dataset.open(built).digest
    assert digests["one"] == digests["same"]
    assert len(set(digests.values())) == 3
    assert len(Dataset.open(copy, exclude="none")) == 30


@pytest.mark.parametrize(
    ("version", "rows", "message"),
    [
        ("../v1", [], "drop list name"),
        ("v1", [(0, 7, "no such sample")], "no sample 7 in shard 0"),
        ("v1", [(5, 0, "no such shard")], "no sample 0 in shard 5"),
        ("v1", [(0, 1, "a"), (0, 2, "b"), (0, 1, "c")], "listed twice"),
    ],
)
def test_bad_drop_lists_are_refused(copy, version, rows, message):
    with pytest.raises(UserError, match=message):
        write_exclude(copy, version, rows)
    assert Dataset.open(copy).exclude_versions() == []


def test_drop_list_never_changes(copy):
    write_exclude(copy, "v1", [(0, 0, "a")])
    before = (copy / manifest.exclude_path("v1")).read_bytes()
    with pytest.raises(UserError, match=r"v1 of .* exists"):
        write_exclude(copy, "v1", [(0, 1, "b")])
    assert (copy / manifest.exclude_path("v1")).read_bytes() == before


def test_what_is_no_data_set_says_why(copy, built, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        Dataset.open(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no data set at .*dataset\.json is missing"):
        Dataset.open(tmp_path)
    with pytest.raises(UserError, match="no drop list 'v9'"):
        Dataset.open(copy, exclude="v9")
    (copy / manifest.DATASET).unlink()
    with pytest.raises(UserError, match="never ended"):
        Dataset.open(copy)
    shutil.copytree(built, tmp_path / "split" / "val")
    with pytest.raises(UserError, match="in it: val"):
        Dataset.open(tmp_path / "split")


def test_mixed_up_files_are_refused(copy, built, source, tmp_path):
    build(source, tmp_path / "other", shard_samples=7, workers=1, seed=1)
    shutil.copy(tmp_path / "other" / manifest.samples_path(4), copy / manifest.samples_path(0))
    with pytest.raises(UserError, match=r"000000\.parquet has 2 rows"):
        Dataset.open(copy).rows(0)
    shutil.copy(tmp_path / "other" / manifest.SHARDS, copy / manifest.SHARDS)
    with pytest.raises(UserError, match="do not belong together"):
        Dataset.open(copy)


def spoilt(path, how):
    whole = bytearray(path.read_bytes())
    if how == "another table":
        pq.write_table(pa.table({"x": [1]}), path)
    elif how == "flipped":
        whole[4 : len(whole) // 2] = bytes(byte ^ 255 for byte in whole[4 : len(whole) // 2])
        path.write_bytes(whole)
    else:
        path.write_bytes({"text": b"not parquet", "empty": b"", "cut": bytes(whole[:-9])}[how])


@pytest.mark.parametrize("how", ["text", "empty", "cut", "flipped", "another table"])
def test_a_damaged_table_is_one_line_for_the_user(copy, how):
    write_exclude(copy, "v1", [(0, 1, "a")])
    dataset = Dataset.open(copy)
    spoilt(copy / manifest.samples_path(1), how)
    for read in (dataset.rows, lambda shard: dataset.read(shard, 0), lambda shard: dataset.table(shard, ["key"])):
        with pytest.raises(UserError, match=r"samples/000001\.parquet is damaged \(.*copy or build the data set again"):
            read(1)
    assert dataset.read(0, 0).key
    spoilt(copy / manifest.exclude_path("v1"), how)
    with pytest.raises(UserError, match=r"exclude/v1\.parquet is damaged"):
        Dataset.open(copy, "v1")
    spoilt(copy / manifest.SHARDS, how)
    with pytest.raises(UserError, match=r"manifest/shards\.parquet is damaged"):
        Dataset.open(copy)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """20 shards of 5 samples each, but for the last one, of 3; labels number the samples."""
    made = [
        [Made(f"image{n:03d}", plain((n, 9, 9)), (n,)) for n in range(5 * s, min(5 * s + 5, 98))] for s in range(20)
    ]
    return write_dataset(tmp_path_factory.mktemp("many"), [f"class{n}" for n in range(98)], made)


def test_a_subset_is_of_whole_shards_and_part_of_every_larger_one(many):
    whole, before = Dataset.open(many), set()
    for samples in (1, 5, 6, 30, 60, 98):
        dataset = Dataset.open(many, subset=samples)
        inside = np.flatnonzero(dataset.shard_sizes)
        assert (dataset.shard_sizes[inside] == whole.shard_sizes[inside]).all()
        assert samples <= len(dataset) < samples + 5
        labels = [label for shard in range(20) for (label,) in dataset.rows(shard).labels]
        assert sorted(labels) == [n for shard in inside for n in range(5 * shard, min(5 * shard + 5, 98))]
        assert sorted(dataset[place].labels[0] for place in range(len(dataset))) == sorted(labels)
        assert before <= set(labels)
        before = set(labels)
        assert np.array_equal(pickle.loads(pickle.dumps(dataset)).shard_sizes, dataset.shard_sizes)
        assert (dataset.digest == whole.digest) == (samples == 98)
    assert len(before) == 98
    few = Dataset.open(many, subset=5)
    assert few.digest == Dataset.open(many, subset=4).digest != Dataset.open(many, subset=6).digest
    # The shards are the same for ever: runs of one study may be years apart.
    assert np.flatnonzero(Dataset.open(many, subset=20).shard_sizes).tolist() == [6, 12, 14, 17]
    for samples in (0, 99):
        with pytest.raises(UserError, match=rf"is {samples} samples, and there are 98; give a number from 1 to that"):
            Dataset.open(many, subset=samples)


def test_a_subset_trains_on_its_own_samples_once_an_epoch(many):
    dataset = Dataset.open(many, subset=30)
    loader = Loader(dataset, global_batch=5, transform=Resize(4), stop=2 * len(dataset), threads=1)
    labels = [label for batch in loader for label in batch.labels.tolist()]
    inside = [n for shard in np.flatnonzero(dataset.shard_sizes) for n in range(5 * shard, min(5 * shard + 5, 98))]
    epochs = labels[: len(dataset)], labels[len(dataset) :]
    assert [sorted(epoch) for epoch in epochs] == [inside, inside]


def test_a_drop_list_counts_before_a_subset(many, tmp_path):
    copy = shutil.copytree(many, tmp_path / "copy")
    first = int(np.flatnonzero(Dataset.open(copy, subset=1).shard_sizes)[0])
    write_exclude(copy, "v1", [(first, index, "test") for index in range(5)])
    dataset = Dataset.open(copy, "v1", subset=5)
    assert dataset.shard_sizes[first] == 0
    assert len(dataset) == 5
    assert dataset.dropped(first).tolist() == [0, 1, 2, 3, 4]
