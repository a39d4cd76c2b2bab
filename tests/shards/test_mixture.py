"""A mixture of data sets, local and remote: the same global batches on any ranks and threads, from any position on."""

import json
import random
from itertools import islice

import numpy as np
import pytest

from shards.augment import InceptionCrop
from shards.build import build
from shards.dataset import Dataset
from shards.decode import decode
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.loader import Loader
from shards.mixture import Mixture
from tests.images import make_image_folder
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.sources.servers import serve
from tests.shards.test_loader import damage

CROP = InceptionCrop(8)
BATCH = 12
CUT = {"lanes": 4, "chunk": 4, "block": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two data sets: 66 images of three classes, and 38 of two of them, in another order."""
    root = tmp_path_factory.mktemp("sources")
    make_image_folder(root / "images" / "a", per_class=22)
    make_image_folder(root / "images" / "b", per_class=19, classes=("red", "blue"))
    for name in "ab":
        build(root / "images" / name, root / name, shard_samples=13, workers=1)
    return root


@pytest.fixture(scope="module")
def mixture(folders):
    return Mixture([(Dataset.open(folders / "a"), 3), (Dataset.open(folders / "b"), 1)])


@pytest.fixture
def own(folders, tmp_path):
    """The second data set, to be damaged."""
    build(folders / "images" / "b", tmp_path / "b", shard_samples=13, workers=1)
    return tmp_path / "b"


def loader(mixture, **options):
    return Loader(mixture, **{"global_batch": BATCH, "transform": CROP, "seed": 5, **CUT} | options)


def take(mixture, steps, world_size=1, state=None, **options):
    """Run all ranks for some steps; returns the stream by position, and the state after it."""
    stream = {}
    for rank in range(world_size):
        mine = loader(mixture, rank=rank, world_size=world_size, **options)
        if state:
            mine.load_state_dict(state)
        for batch in islice(mine, steps):
            for image, label, position in zip(*batch, strict=True):
                assert int(position) not in stream
                stream[int(position)] = (image.tobytes(), int(label))
    return stream, json.loads(json.dumps(mine.state_dict()))


@pytest.fixture(scope="module")
def stream(mixture):
    """Three periods of 64 rows of 4 lanes, and a bit: the larger source's 9th epoch has begun."""
    return take(mixture, 66)[0]


def test_samples_come_by_their_weights_under_their_own_keys(mixture, stream):
    order = loader(mixture).order
    positions = np.arange(66 * BATCH)
    source, _ = order.draw(positions)
    for period in range(3):
        drawn = source[period * 256 : (period + 1) * 256]
        assert [(drawn == s).sum() for s in (0, 1)] == [192, 64]
    for p, epoch, shard, index in zip(positions, *order.locate(positions), strict=True):
        dataset, number = mixture.place(int(shard))
        sample = dataset.read(number, int(index))
        pixels = CROP(decode(sample.image, sample.key), (5, int(epoch), int(p)))
        assert stream[p] == (pixels.tobytes(), mixture.classes.index(dataset.classes[sample.labels[0]]))


def test_same_global_batches_for_any_ranks_and_threads(mixture, stream):
    for world_size in (1, 2, 3):
        for threads in (1, 4):
            got, _ = take(mixture, 20, world_size, threads=threads)
            assert got == {p: stream[p] for p in range(20 * BATCH)}


def test_resumed_at_random_points_on_other_ranks(mixture, stream):
    draw, done, state, got = random.Random(0), 0, None, {}
    while done < 66:
        steps = min(draw.randint(1, 20), 66 - done)
        more, state = take(mixture, steps, draw.choice([1, 2, 3]), state, threads=draw.choice([1, 4]))
        got, done = got | more, done + steps
        assert state["samples"] == done * BATCH
    assert got == stream


@pytest.mark.parametrize("remote", ["b", "ab"])
def test_remote_sources_give_the_same_batches_and_read_chunks(folders, stream, remote):
    with serve(folders) as url:
        sources = [(Dataset.open(f"{url}/{n}" if n in remote else folders / n), w) for n, w in (("a", 3), ("b", 1))]
        mixed = Mixture(sources)
        assert mixed.local.tolist() == [n not in remote for n, count in (("a", 6), ("b", 3)) for _ in range(count)]
        asked = []
        for dataset, _ in sources:
            read_many, read = dataset.read_many, dataset.read
            dataset.read_many = lambda *a, f=read_many, d=dataset: asked.append((d, "chunk")) or f(*a)
            dataset.read = lambda s, i, f=read, d=dataset: asked.append((d, "one")) or f(s, i)
        for world_size in (1, 2):
            assert take(mixed, 66, world_size)[0] == stream
        assert {how for dataset, how in asked if not dataset.tars.local} == {"chunk"}
        assert {how for dataset, how in asked if dataset.tars.local} <= {"one"}


def test_broken_samples_get_stand_ins_of_the_same_source(folders, own, tmp_path):
    sources = [(Dataset.open(folders / "a"), 3), (Dataset.open(own), 1)]
    whole, _ = take(Mixture(sources), 30)
    damage(own, [(0, 3), (1, 2)])
    sources = [(Dataset.open(folders / "a"), 3), (Dataset.open(own), 1)]
    mixed = Mixture(sources)
    mine = loader(mixed, quarantine=tmp_path / "quarantine.jsonl")
    stream = {int(p): (i.tobytes(), int(n)) for b in islice(mine, 30) for i, n, p in zip(*b, strict=True)}
    order, positions = mine.order, np.arange(30 * BATCH)
    epoch, shard, index = order.locate(positions)
    bad = [p for p in positions if (shard[p] - 6, index[p]) in [(0, 3), (1, 2)]]
    assert mine.replaced == len(bad) > 2
    for p in positions:
        if p not in bad:
            assert stream[p] == whole[p]
            continue
        tries = (order.stand_in(int(p), k) for k in range(1, 9))
        other = next(q for q in tries if (order.locate([q])[1][0] - 6, order.locate([q])[2][0]) not in [(0, 3), (1, 2)])
        _, (where,), (place,) = order.locate([other])
        dataset, number = mixed.place(where)
        assert dataset is sources[1][0]
        sample = dataset.read(number, place)
        pixels = CROP(decode(sample.image, sample.key), (5, int(epoch[p]), int(p)))
        assert stream[p] == (pixels.tobytes(), mixed.classes.index(dataset.classes[sample.labels[0]]))
    assert take(mixed, 30, 3)[0] == stream
    ledger = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    found = {(entry["data"], entry["shard"], entry["index"], entry["key"]) for entry in ledger}
    assert found == {(str(own), s, i, sources[1][0].read(s, i).key) for s, i in [(0, 3), (1, 2)]}


def test_another_mixture_is_refused_in_plain_words(folders, mixture, own):
    a, b = mixture.datasets
    state = loader(mixture).state_dict()
    assert state["weights"] == [48, 16]
    assert state["data"] == [a.digest, b.digest]
    write_exclude(own, "v1", [(0, 1, "blurred")])
    dropped = Dataset.open(own, "v1")
    twice = [a.digest[:12]] * 2
    for sources, words in [
        ([(a, 1), (b, 1)], r"weights is \[32, 32\], was \[48, 16\]; use the settings"),
        ([(a, 3), (a, 1)], rf"data is \[{', '.join(twice)}\], was \[{a.digest[:12]}, {b.digest[:12]}\]; the samples"),
        ([(a, 3), (dropped, 1)], r"data is .*; exclude is \[None, v1\], was \[None, None\]; .* the data set and drop"),
        ([(a, 1)], r"weights is \[64\], was \[48, 16\]; data is \["),
    ]:
        with pytest.raises(UserError, match=words):
            loader(Mixture(sources)).load_state_dict(state)
    with pytest.raises(UserError, match=rf"data is {a.digest[:12]}, was \["):
        loader(a).load_state_dict(state)
    loader(Mixture([(a, 0.75), (Dataset.open(own), 0.25)])).load_state_dict(state)  # the same ratio, a moved copy


def test_without_a_cut_given_the_sources_share_lanes_and_window(mixture):
    order = Loader(mixture, global_batch=BATCH, transform=CROP).order
    assert order.samples == len(mixture) == 104
    assert len({one.shuffle.lanes for one in order.orders}) == 1


def classes_of(folder, classes):
    return Dataset.open(write_dataset(folder, classes, [[Made("x", plain("red"), (len(classes) - 1,))]]))


def test_classes_go_by_name_and_those_that_differ_are_named(tmp_path):
    first = classes_of(tmp_path / "first", ["cat", "dog", "owl"])
    same = classes_of(tmp_path / "same", ["owl", "cat"])
    assert Mixture([(first, 1), (same, 1)]).read(1, 0).labels == (0,)
    assert Mixture([(first, 1), (same, 1)]).read_many(1, 0, 1)[0].labels == (0,)
    other = classes_of(tmp_path / "other", ["Cat", "dog", "lynx"])
    with pytest.raises(UserError, match=r"2 of the classes of .*other are not among .*first: 'Cat', 'lynx'; put the"):
        Mixture([(first, 1), (other, 1)])
    twice = classes_of(tmp_path / "twice", ["crane", "crane", "dog"])
    assert Mixture([(twice, 1), (twice, 1)]).classes == twice.classes
    with pytest.raises(UserError, match=r"has several of one name: 'crane'; build both"):
        Mixture([(twice, 1), (classes_of(tmp_path / "once", ["dog", "crane"]), 1)])
    assert Mixture([(twice, 1), (classes_of(tmp_path / "dog", ["dog"]), 1)]).read(1, 0).labels == (2,)
    with pytest.raises(UserError, match="no source"):
        Mixture([])
