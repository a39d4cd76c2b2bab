import json
import threading
from itertools import islice
from time import perf_counter

import numpy as np
import pytest
from PIL import Image

from shards import manifest
from shards.augment import InceptionCrop, Resize, draws
from shards.build import build
from shards.dataset import Dataset
from shards.decode import DecodeError, decode
from shards.droplist import write_exclude
from shards.errors import PatchmillError, UserError
from shards.evaluation import EvaluationLoader
from shards.loader import Loader
from shards.mixture import Mixture
from shards.store import open_store
from tests.shards.datasets import Made, damage, plain, write_dataset

SAMPLES = 53  # prime: nothing divides an epoch
CROP = InceptionCrop(16)
BATCH = 12


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Noise images in three classes."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(SAMPLES):
        file = folder / f"class{i % 3}" / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i % 5, 24, 3), dtype=np.uint8)).save(file)
    return folder


@pytest.fixture(scope="session")
def dataset(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "set"
    build(source, out, shard_samples=10, workers=1)
    return Dataset.open(out)


@pytest.fixture
def own(source, tmp_path):
    """A data set that a test may damage."""
    build(source, tmp_path / "own", shard_samples=10, workers=1)
    return tmp_path / "own"


def loader(dataset, **options):
    return Loader(dataset, **{"global_batch": BATCH, "transform": CROP, "seed": 5} | options)


def take(dataset, steps, world_size=1, state=None, **options):
    """Run all ranks for some steps; returns the stream by position, and the state after it."""
    stream = {}
    for rank in range(world_size):
        mine = loader(dataset, rank=rank, world_size=world_size, **options)
        if state:
            mine.load_state_dict(state)
        for batch in islice(mine, steps):
            assert len(batch.images) == mine.global_batch // world_size
            for image, label, position in zip(*batch, strict=True):
                assert int(position) not in stream
                stream[int(position)] = (image.tobytes(), int(label))
    return stream, json.loads(json.dumps(mine.state_dict()))


def test_batches_are_the_samples_of_the_order_transformed(dataset):
    mine = loader(dataset)
    for batch in islice(mine, 6):
        assert batch.images.dtype == np.uint8
        assert batch.labels.dtype == batch.positions.dtype == np.int64
        for row, (epoch, shard, index) in enumerate(zip(*mine.order.locate(batch.positions), strict=True)):
            sample = dataset.read(int(shard), int(index))
            key = (5, int(epoch), int(batch.positions[row]))
            assert (batch.images[row] == CROP(decode(sample.image, sample.key), key)).all()
            assert batch.labels[row] == sample.labels[0]


def test_same_global_batches_for_any_ranks_and_threads(dataset):
    want, _ = take(dataset, 10)
    assert sorted(want) == list(range(10 * BATCH))
    for world_size in (1, 2, 3, 4):
        for threads in (1, 4):
            assert take(dataset, 10, world_size, threads=threads)[0] == want


def test_resumed_stream_goes_on_on_other_ranks(dataset):
    want, _ = take(dataset, 10)
    got, state = take(dataset, 3, 2)
    assert state["samples"] == 3 * BATCH
    for steps, world_size in ((4, 3), (3, 4)):
        more, state = take(dataset, steps, world_size, state)
        got |= more
    assert got == want


def test_batch_size_may_change_between_steps(dataset):
    want, _ = take(dataset, 10)
    mine, got = loader(dataset), {}
    for step, batch in enumerate(islice(mine, 5)):
        got |= {int(p): (i.tobytes(), int(n)) for i, n, p in zip(*batch, strict=True)}
        mine.global_batch = (24, 24, 6, 36, 1)[step]
    assert sorted(got) == list(range(12 + 24 + 24 + 6 + 36))
    assert all(got[p] == want[p] for p in got)
    with pytest.raises(UserError, match="7 does not divide among 2 ranks; use 6 or 8"):
        loader(dataset, world_size=2).global_batch = 7


def test_state_may_be_loaded_between_steps(dataset):
    mine = loader(dataset)
    batches = iter(mine)
    first = next(batches)
    state = mine.state_dict()
    second = next(batches)
    next(batches)
    mine.load_state_dict(state)
    again = next(batches)
    assert (again.images == second.images).all()
    assert again.positions[0] == BATCH
    assert (first.positions == np.arange(BATCH)).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 6}, "seed is 6, was 5"),
        ({"lanes": 5, "block": 3}, "lanes is 5, was 4; block is 3, was 12"),
        ({"chunk": 2}, "chunk is 2, was 1"),
    ],
)
def test_another_order_is_refused(dataset, change, words):
    cut = {"lanes": 4, "chunk": 1, "block": 12}
    state = loader(dataset, **cut).state_dict()
    with pytest.raises(UserError, match=words):
        loader(dataset, **cut | change).load_state_dict(state)


def test_other_data_and_decoder_are_refused(dataset, own):
    mine, state = loader(dataset), loader(dataset).state_dict()
    with pytest.raises(UserError, match=f"data is {dataset.digest[:12]}, was abc; the samples are others"):
        mine.load_state_dict(state | {"data": "abc"})
    other = state | {"decoder": "older 1.0", "samples": 24}
    with pytest.raises(UserError, match=r"decoder is simplejpeg .*, was older 1\.0"):
        mine.load_state_dict(other)
    assert mine.samples == 0
    mine.load_state_dict(other, allow_decoder_change=True)
    assert mine.samples == 24


def test_another_drop_list_is_refused_and_named(own):
    write_exclude(own, "v1", [(0, 1, "blurred")])
    write_exclude(own, "v2", [(0, 1, "blurred"), (3, 2, "a copy of a test image")])
    write_exclude(own, "v1-again", [(0, 1, "blurred")])
    state = loader(Dataset.open(own, "v1")).state_dict()
    assert state["exclude"] == "v1"
    for version, words in [
        (
            "v2",
            r"data is \w{12}, was \w{12}; exclude is v2, was v1; the samples .* drop list of then, or start a new run",
        ),
        (None, r"data is \w{12}, was \w{12}; exclude is None, was v1; "),
        ("v1-again", r"stream: exclude is v1-again, was v1; "),
    ]:
        mine = loader(Dataset.open(own, version))
        with pytest.raises(UserError, match=words) as raised:
            mine.load_state_dict(state | {"samples": 24})
        assert "\n" not in str(raised.value)
        assert mine.samples == 0
    loader(Dataset.open(own, "v1")).load_state_dict(state)


def test_broken_samples_get_stand_ins_from_their_block(own, tmp_path):
    whole, _ = take(Dataset.open(own), 5)
    broken = [(0, 3), (2, 7), (2, 8)]
    damage(own, broken)
    dataset = Dataset.open(own)
    mine = loader(dataset, quarantine=tmp_path / "quarantine.jsonl")
    stream = {int(p): (i.tobytes(), int(n)) for b in islice(mine, 5) for i, n, p in zip(*b, strict=True)}

    epoch, shard, index = mine.order.locate(np.arange(5 * BATCH))
    bad = [p for p in range(5 * BATCH) if (shard[p], index[p]) in broken]
    assert mine.replaced == len(bad) >= len(broken)
    for p in range(5 * BATCH):
        if p not in bad:
            assert stream[p] == whole[p]
            continue
        tries = (mine.order.locate(np.array([mine.order.stand_in(p, k)])) for k in range(1, 9))
        found = ((int(s[0]), int(i[0])) for _, s, i in tries)
        sample = dataset.read(*next(where for where in found if where not in broken))
        pixels = CROP(decode(sample.image, sample.key), (5, int(epoch[p]), p))
        assert stream[p] == (pixels.tobytes(), sample.labels[0])

    for world_size in (2, 3):
        assert take(dataset, 5, world_size)[0] == stream
    ledger = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert sorted((entry["shard"], entry["index"]) for entry in ledger) == broken
    for entry in ledger:
        assert entry["key"] == dataset.read(entry["shard"], entry["index"]).key
        assert entry["key"] in entry["reason"]


class Corner:
    """A transform as users write them: the image's corner, in one of its colours."""

    size = 12

    def __call__(self, image, key):
        colour = int(next(draws(key, 100)) * 3)
        image[..., 1] = image[..., colour]  # in place: the image is the transform's own
        return image[:12, :12, [1, 1, 1]]


def test_any_transform_can_be_given(dataset):
    want, _ = take(dataset, 6, transform=Corner())
    assert all(take(dataset, 6, world_size, transform=Corner(), threads=3)[0] == want for world_size in (1, 2, 3))
    order = loader(dataset).order
    colours = set()
    for position in range(6 * BATCH):
        epoch, shard, index = (int(x[0]) for x in order.locate(np.array([position])))
        sample = dataset.read(shard, index)
        colour = int(next(draws((5, epoch, position), 100)) * 3)
        pixels = decode(sample.image, sample.key)[:12, :12, [colour] * 3]
        assert want[position] == (pixels.tobytes(), sample.labels[0])
        colours.add(colour)
    assert colours == {0, 1, 2}


def test_a_function_with_a_size_will_do(dataset):
    def crop(image, key):
        return image[:8, :8]

    with pytest.raises(UserError, match=r"crop.* has no attribute size; set it to the side"):
        next(iter(loader(dataset, transform=crop)))
    crop.size = 8
    assert next(iter(loader(dataset, transform=crop))).images.shape == (BATCH, 8, 8, 3)
    crop.size = 9
    with pytest.raises(UserError, match=r"made uint8 \(8, 8, 3\) of .*; let it make uint8 \(9, 9, 3\)"):
        next(iter(loader(dataset, transform=crop)))
    assert not decoding_threads()


@pytest.mark.parametrize(
    ("made", "words"),
    [(lambda x: x / 255, "float64"), (lambda x: x[..., :1], r"\(8, 8, 1\)"), (lambda x: x.tolist(), "list")],
)
def test_a_transform_that_makes_something_else_is_told(dataset, made, words):
    def transform(image, key):
        return made(image[:8, :8])

    transform.size = 8
    with pytest.raises(UserError, match=f"the transform made .*{words}.* of class"):
        next(iter(loader(dataset, transform=transform)))


def decoding_threads():
    return [t for t in threading.enumerate() if t.name.startswith("decode")]


def test_data_that_is_broken_throughout_ends_the_run(own):
    sizes = Dataset.open(own).shard_sizes
    damage(own, [(s, i) for s, n in enumerate(sizes) for i in range(n)])
    with pytest.raises(PatchmillError, match="64 samples near it cannot be decoded"):
        next(iter(loader(Dataset.open(own))))


def test_an_error_of_a_thread_reaches_the_consumer_and_ends_the_threads(own):
    dataset = Dataset.open(own)
    for tar in (own / "shards").iterdir():
        tar.unlink()
    batches = iter(loader(dataset, threads=3))
    with pytest.raises(PatchmillError, match=r"no object .*shards/00000"):
        next(batches)
    assert not decoding_threads()
    with pytest.raises(PatchmillError, match=r"no object"):
        next(iter(EvaluationLoader(dataset, 4, transform=CROP)))
    assert not decoding_threads()


def test_several_labels_are_refused_in_plain_words(own):
    store, path = open_store(own), manifest.samples_path(0)
    receipt, table = manifest.read_receipt(store, path), manifest.read_table(store.read(path))
    rows = table.to_pydict()
    rows["labels"] = [[0, 1] for _ in rows["labels"]]
    manifest.write_samples(store, path, rows, receipt)
    with pytest.raises(UserError, match="2 labels, one is needed"):
        list(islice(loader(Dataset.open(own)), 5))


def test_threads_end_with_the_iterator(dataset):
    for _ in loader(dataset, threads=4):
        assert decoding_threads()
        break
    assert not decoding_threads()
    batches = iter(loader(dataset))
    next(batches)
    batches.close()
    assert not decoding_threads()
    for _ in EvaluationLoader(dataset, 4, transform=CROP):
        break
    assert not decoding_threads()


def test_counts_are_of_what_the_threads_did(own):
    dataset = Dataset.open(own)
    mine = loader(dataset, prefetch=0, threads=3)
    began = perf_counter()
    batches = list(islice(mine, 3))
    seconds = perf_counter() - began
    _, shard, index = mine.order.locate(np.concatenate([batch.positions for batch in batches]))
    counts = mine.counts()
    assert counts.bytes == sum(int(dataset.rows(s).size[i]) for s, i in zip(shard, index, strict=True))
    assert 0 < counts.read_seconds < 3 * seconds
    assert 0 < counts.decode_seconds < 3 * seconds
    assert counts.replaced == counts.quarantined == 0
    damage(own, [(0, 3), (2, 7)])
    mine = loader(Dataset.open(own), prefetch=0)
    list(islice(mine, 9))  # two epochs
    assert mine.counts().quarantined == 2
    assert mine.counts().replaced == mine.replaced >= 4


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_stream_with_a_stop_has_a_length_and_ends(dataset, prefetch):
    endless, _ = take(dataset, 10)
    mine = loader(dataset, stop=SAMPLES, prefetch=prefetch)
    assert len(mine) == 5  # 53 samples in batches of 12
    assert len(list(mine)) == 5
    assert mine.samples == 60
    assert not list(mine)
    assert len(mine) == 0
    mine.stop = 2 * SAMPLES  # the next epoch: on from where it stands
    assert len(mine) == 4
    for left, batch in zip((3, 2, 1, 0), mine, strict=True):
        assert len(mine) == left
        assert all(
            endless[int(p)][0] == image.tobytes() for image, p in zip(batch.images, batch.positions, strict=True)
        )
    mine.load_state_dict(mine.state_dict() | {"samples": 24})
    assert len(mine) == 7
    batches = iter(mine)
    assert next(batches).positions[0] == 24
    mine.global_batch = 6
    assert len(mine) == 12
    assert len(list(batches)) == 12
    assert not decoding_threads()


def test_nothing_is_read_past_a_stop(dataset, monkeypatch):
    began = []
    read = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, *where: began.append(where) or read(self, *where))
    assert len(list(loader(dataset, stop=2 * BATCH, prefetch=5))) == 2
    assert len(began) == 2 * BATCH


def test_an_endless_stream_has_no_length(dataset):
    with pytest.raises(TypeError, match=r"no end, so no length; set Loader\(stop=\.\.\.\)"):
        len(loader(dataset))


def test_look_ahead_is_bounded_and_not_counted(dataset, monkeypatch):
    began = []
    read = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, *where: began.append(where) or read(self, *where))
    mine = loader(dataset, prefetch=3)
    batches = iter(mine)
    next(batches)
    assert mine.samples == mine.state_dict()["samples"] == BATCH
    assert len(began) <= 4 * BATCH
    batches.close()


@pytest.mark.parametrize(
    ("batch", "world_size"), [(1, 1), (4, 3), (16, 4), (53, 1), (60, 2), (5, 11), (1, 60), (2, 64)]
)
def test_evaluation_reads_every_sample_once(dataset, batch, world_size):
    found, steps = {}, set()
    for rank in range(world_size):
        mine = EvaluationLoader(dataset, batch, transform=Resize(8), rank=rank, world_size=world_size)
        parts = list(mine)
        assert len(parts) == len(mine)
        steps.add(len(parts))
        for part in parts:
            assert len(part.images) == len(part.labels) == len(part.valid) == batch
            assert not part.images[~part.valid].any()
            for image, label, position in zip(
                part.images[part.valid], part.labels[part.valid], part.positions[part.valid], strict=True
            ):
                assert int(position) not in found
                found[int(position)] = (image, label)
    assert len(steps) == 1
    assert sorted(found) == list(range(SAMPLES))
    for position, (image, label) in found.items():
        sample = dataset[position]
        assert label == sample.labels[0]
        assert (image == Resize(8)(decode(sample.image, sample.key), (0, 0, 0))).all()


def test_an_evaluation_may_be_iterated_again(dataset):
    mine = EvaluationLoader(dataset, 20, transform=Resize(8))
    first, second = ([batch.images for batch in mine] for _ in range(2))
    assert len(first) == len(mine) == 3
    assert np.array_equal(first, second)
    assert not decoding_threads()


def test_evaluation_stops_at_a_broken_sample(own):
    damage(own, [(1, 2)])
    with pytest.raises(DecodeError):
        list(EvaluationLoader(Dataset.open(own), 8, transform=Resize(8)))


def labelled(folder, labels, weights=None):
    """Return a data set of one shard, an image for each tuple of labels, of the classes a, b and c."""
    weights = weights or [None] * len(labels)
    made = [Made(f"k{i}", plain("red"), *each) for i, each in enumerate(zip(labels, weights, strict=True))]
    return Dataset.open(write_dataset(folder, ["a", "b", "c"], [made]))


def test_several_labels_and_none_come_filled_up_with_their_weights(tmp_path):
    dataset = labelled(tmp_path / "set", [(2,), (0, 1), ()], [None, (0.5, 1.5), None])
    for batch in (
        next(iter(loader(dataset, global_batch=3, labels="any"))),
        next(iter(EvaluationLoader(dataset, 3, transform=CROP, labels="any"))),
    ):
        rows = sorted(zip(batch.labels["label"].tolist(), batch.labels["weight"].tolist(), strict=True))
        assert rows == [([-1, -1], [0, 0]), ([0, 1], [0.5, 1.5]), ([2, -1], [1, 0])]
        assert (batch.labels["label"].dtype, batch.labels["weight"].dtype) == (np.int64, np.float32)
    with pytest.raises(UserError, match="sample k2 has no label, at least one is needed"):
        next(iter(loader(dataset, global_batch=3, labels="some")))


@pytest.mark.parametrize("labels", [(3,), (1, 7), (-1,)])
def test_a_label_of_no_class_names_sample_shard_value_and_classes(tmp_path, labels):
    dataset = labelled(tmp_path / "set", [(0,), labels, (2,)])
    value = ", ".join(map(str, labels))
    words = rf"sample k1 in shards/000000\.tar of .*set has the label {value}, and there are 3 classes"
    other = labelled(tmp_path / "other", [(1,)])
    for broken in (
        loader(dataset, global_batch=3, labels="any"),
        loader(Mixture([(other, 1), (dataset, 1)]), global_batch=8, labels="any"),
        EvaluationLoader(dataset, 3, transform=CROP, labels="any"),
    ):
        with pytest.raises(UserError, match=words):
            list(islice(broken, 3))
