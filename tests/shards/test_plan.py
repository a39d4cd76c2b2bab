"""The plan of a build: a function of the items, whatever their order, in bounded memory."""

import hashlib
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import plan as planning
from shards.errors import UserError
from shards.plan import Slice, job_file, make_plan, read_job
from shards.sources import Item

SETTINGS = {"split": {}, "seed": 0, "shard_samples": 7, "shard_bytes": 10**9, "own": Slice()}


def items(count, size=10):
    return [Item(f"k{i}", f"f{i}", 0, size, (i % 3,)) for i in range(count)]


def plan(tmp_path, items, **settings):
    settings = SETTINGS | settings
    plans = make_plan(items, tmp_path, **settings)
    shards = {
        name: {
            shard: read_job(job_file(tmp_path, name, shard))
            for shard in range(len(part.samples))
            if settings["own"].has(shard)
        }
        for name, part in plans.items()
    }
    return plans, shards


def test_every_item_once_in_the_order_of_its_hash(tmp_path):
    plans, shards = plan(tmp_path, items(100))
    found = [item for shard in shards["all"].values() for item in shard]
    assert found == sorted(items(100), key=lambda item: hashlib.sha256(f"0:{item.key}".encode()).hexdigest())
    assert plans["all"].samples == [7] * 14 + [2]
    assert plans["all"].bytes == 1000
    assert [item.key for item in found] != [item.key for item in items(100)]


def test_neither_order_nor_spilling_matters(tmp_path, monkeypatch):
    reference = plan(tmp_path / "a", items(500))
    shuffled = items(500)
    random.Random(0).shuffle(shuffled)
    assert plan(tmp_path / "b", shuffled) == reference
    monkeypatch.setattr(planning, "SPILL", 37)
    assert plan(tmp_path / "c", shuffled, split={"val": 0.3}) == plan(tmp_path / "d", items(500), split={"val": 0.3})
    assert plan(tmp_path / "e", shuffled) == reference
    assert not list(tmp_path.rglob("*.bucket"))


def test_seed_labels_and_places_are_in_the_digest_times_are_not(tmp_path):
    def digest(name, changed, **settings):
        return plan(tmp_path / name, changed, **settings)[0]["all"].digest

    base = digest("base", items(20))
    assert digest("same", [item._replace(changed=5) for item in items(20)]) == base
    others = [
        digest("seed", items(20), seed=1),
        digest("label", [item._replace(labels=(0,)) for item in items(20)]),
        digest("weights", [item._replace(weights=(0.5,)) for item in items(20)]),
        digest("size", items(20, size=11)),
        digest("offset", [item._replace(offset=512) for item in items(20)]),
        digest("file", [item._replace(file="x") for item in items(20)]),
    ]
    assert len({base, *others}) == 7


def test_slices_share_out_the_shards(tmp_path):
    plans, whole = plan(tmp_path / "whole", items(100))
    shares = [plan(tmp_path / str(i), items(100), own=Slice(i, 3)) for i in range(3)]
    assert all(share[0] == plans for share in shares)
    assert {shard: job for share in shares for shard, job in share[1]["all"].items()} == whole["all"]
    assert [len(share[1]["all"]) for share in shares] == [5, 5, 5]


@given(st.lists(st.integers(-1, 40), min_size=1, max_size=60), st.integers(1, 10), st.integers(1, 60))
def test_shards_are_as_full_as_they_may_be(tmp_path_factory, sizes, shard_samples, shard_bytes):
    folder = tmp_path_factory.mktemp("plan")
    given_items = [Item(f"k{i}", "f", 0, size, (0,)) for i, size in enumerate(sizes)]
    _, shards = plan(folder, given_items, shard_samples=shard_samples, shard_bytes=shard_bytes)
    shards = list(shards["all"].values())
    known = [[max(item.size, 0) for item in shard] for shard in shards]
    for shard in known:
        assert len(shard) <= shard_samples
        assert sum(shard) <= shard_bytes or len(shard) == 1
    for shard, after in pairwise(known):
        assert len(shard) == shard_samples or sum(shard) + after[0] > shard_bytes


def test_parts_of_the_source_and_splits_of_its_training_part(tmp_path):
    both = [item._replace(part="train") for item in items(300)]
    both += [item._replace(part="test") for item in items(50)]
    plans, shards = plan(tmp_path / "a", both)
    assert list(plans) == ["train", "test"]
    assert [sum(part.samples) for part in plans.values()] == [300, 50]
    plans, shards = plan(tmp_path / "b", both, split={"val": 0.2})
    assert list(plans) == ["train", "test", "val"]
    keys = {name: {item.key for shard in part.values() for item in shard} for name, part in shards.items()}
    assert len(keys["test"]) == 50
    assert len(keys["train"] | keys["val"]) == 300
    assert 30 < len(keys["val"]) < 90
    assert not keys["train"] & keys["val"]
    with pytest.raises(UserError, match="--split test: the source has a part"):
        plan(tmp_path / "c", both, split={"test": 0.2})


def test_two_items_of_one_key_are_named(tmp_path):
    twice = [*items(50), Item("k7", "other.tar", 512, 1, (0,))]
    with pytest.raises(UserError, match=r"f7 and other\.tar at byte 512 have one key, k7|other\.tar .* and f7 have"):
        plan(tmp_path, twice)


def test_many_pairs_are_listed_at_once(tmp_path):
    with pytest.raises(UserError, match=r"f1 and g1 have one key, k1;.*and 15 more pairs") as caught:
        plan(tmp_path, [*items(25), *(item._replace(file=f"g{i}") for i, item in enumerate(items(25)))])
    assert str(caught.value).count("have one key") == 10


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800"])
def test_keys_that_no_tar_can_hold(tmp_path, key):
    with pytest.raises(UserError, match="key"):
        plan(tmp_path, [*items(3), Item(key, "table row", 0, 1, (0,))])


def test_parts_and_none_do_not_mix(tmp_path):
    with pytest.raises(UserError, match=r"images in parts \(train\) and others in none"):
        plan(tmp_path, [*items(3), items(4)[3]._replace(part="train")])


def test_nothing_to_plan(tmp_path):
    with pytest.raises(UserError, match="no images"):
        plan(tmp_path, [])


@pytest.mark.parametrize("text", ["1/1", "2/2", "-1/2", "1", "a/b", "1/", "/2", "0/0", "1.0/2"])
def test_bad_slices(text):
    with pytest.raises(UserError, match="--slice"):
        Slice.parse(text)


def test_slice_is_parsed():
    assert Slice.parse("3/8") == Slice(3, 8)
