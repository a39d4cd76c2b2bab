"""A build in slices: the same bytes as in one, whoever comes when, and nothing without all of them."""

import json
import subprocess
import sys

import pytest

from shards import manifest
from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from shards.merge import merge
from shards.plan import Slice
from tests.shards.images import make_source, tree


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), classes=3, each=10)


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "out"
    build(source, folder, shard_samples=3, split={"val": 0.3}, workers=1)
    return folder


def one_slice(source, out, index, count=3, **settings):
    settings = {"shard_samples": 3, "split": {"val": 0.3}, "workers": 1} | settings
    return build(source, out, own=Slice(index, count), **settings)


def test_slices_and_merge_make_the_bytes_of_one_build(source, reference, tmp_path):
    out = tmp_path / "out"
    for index in (2, 0, 1):
        made = one_slice(source, out, index)
        assert not made.finished
        assert not list(out.rglob(manifest.DATASET))
    merged = merge(out)
    assert merged.finished
    assert tree(out) == tree(reference)
    assert sum(part.samples for part in merged.parts.values()) == 30
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert merge(out).parts == merged.parts
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_slices_at_the_same_time(source, reference, tmp_path):
    program = """
import sys
from shards.build import build
from shards.plan import Slice
build(sys.argv[1], sys.argv[2], own=Slice(int(sys.argv[3]), 3), shard_samples=3, split={"val": 0.3}, workers=1)
"""
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(source), str(out)]
    slices = [subprocess.Popen([*command, str(index)]) for index in range(3)]
    assert [each.wait(timeout=60) for each in slices] == [0, 0, 0]
    merge(out)
    assert tree(out) == tree(reference)


def test_missing_shards_are_named(source, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no folder"):
        merge(out)
    one_slice(source, out, 0)
    with pytest.raises(UserError, match=r"shards are not built yet, .*train/shards/000001\.tar"):
        merge(out)
    with pytest.raises(UserError, match=r"no data set"):
        Dataset.open(out / "train")
    one_slice(source, out, 1)
    one_slice(source, out, 2)
    victim = out / "train" / manifest.shard_path(1)
    victim.write_bytes(victim.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"1 of \d+ shards .*train/shards/000001\.tar; run the slices"):
        merge(out)
    one_slice(source, out, 1)
    merge(out)
    with pytest.raises(UserError, match="no build is under way"):
        merge(tmp_path)


def test_slices_of_different_builds_do_not_mix(source, tmp_path):
    out = tmp_path / "out"
    one_slice(source, out, 0)
    with pytest.raises(UserError, match="holds slices of another build"):
        one_slice(source, out, 1, seed=1)
    other = make_source(tmp_path / "other", classes=3, each=9)
    with pytest.raises(UserError, match="holds slices of another build"):
        one_slice(other, out, 1)


def test_a_whole_build_ends_what_slices_began(source, reference, tmp_path):
    out = tmp_path / "out"
    one_slice(source, out, 0)
    build(source, out, shard_samples=3, split={"val": 0.3}, workers=1)
    assert tree(out) == tree(reference)
    one_slice(source, out, 1)  # comes late: all is there
    merge(out)
    assert tree(out) == tree(reference)


def test_stale_shards_of_a_longer_try_are_not_merged(source, tmp_path):
    out = tmp_path / "out"
    one_slice(source, out, 0, shard_samples=1)
    (out / "building.json").unlink()  # the user began anew
    for index in range(3):
        one_slice(source, out, index, shard_samples=5)
    merge(out)
    build(source, tmp_path / "fresh", shard_samples=5, split={"val": 0.3}, workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_merge_knows_the_newest_images_that_any_slice_saw(tmp_path):
    source, out = make_source(tmp_path / "source", classes=3, each=10), tmp_path / "out"
    one_slice(source, out, 0, 2)
    begun = json.loads((out / "building.json").read_text())
    for path in source.rglob("*.jpg"):
        path.touch()
    one_slice(source, out, 1, 2)
    seen = json.loads((out / "building.json").read_text())
    assert seen["parts"]["train"]["changed"] > begun["parts"]["train"]["changed"]
    for part in seen["parts"].values():  # a slice on a machine that has not heard of the changes yet
        part["changed"] = [time + 10**9 for time in part["changed"]]
    (out / "building.json").write_text(json.dumps(seen))
    one_slice(source, out, 1, 2)
    assert json.loads((out / "building.json").read_text()) == seen


def test_a_source_that_changed_between_slices_is_seen_by_merge(tmp_path):
    source, out = make_source(tmp_path / "source", classes=3, each=10), tmp_path / "out"
    one_slice(source, out, 0, 2)
    for path in source.rglob("*.jpg"):  # the same size: neither key nor plan tells
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    one_slice(source, out, 1, 2)
    with pytest.raises(UserError, match=r"shards are not built yet, or are older than their images: .*000000\.tar"):
        merge(out)
    one_slice(source, out, 0, 2)
    merge(out)
    build(source, tmp_path / "fresh", shard_samples=3, split={"val": 0.3}, workers=1)
    assert tree(out) == tree(tmp_path / "fresh")
