"""Broken images are listed once, with all that is needed to find and to drop them."""

import json
from itertools import islice

import numpy as np
import pytest
from typer.testing import CliRunner

from launch.cli import app
from shards import manifest
from shards.augment import Resize
from shards.dataset import Dataset
from shards.droplist import read_exclude, write_exclude
from shards.errors import PatchmillError
from shards.loader import Loader
from shards.mixture import Mixture
from shards.quarantine import place_of, read_quarantine
from tests.shards.datasets import Made, plain, write_dataset

BROKEN = [(0, 5), (2, 1), (2, 2)]


@pytest.fixture
def data(tmp_path):
    """Four shards of eight; three images are broken, and the drop list v1 has others before them."""
    shards = [[Made(f"s{shard}/{i}", plain((shard, i, 9)), (i,)) for i in range(8)] for shard in range(4)]
    folder = write_dataset(tmp_path / "data", [str(i) for i in range(8)], shards)
    write_exclude(folder, "v1", [(0, 1, "copy"), (0, 2, "copy"), (2, 0, "copy")])
    for shard, index in BROKEN:
        rows = Dataset.open(folder).rows(shard)
        with open(folder / manifest.shard_path(shard), "r+b") as tar:
            tar.seek(int(rows.offset[index]) + 30)
            tar.write(bytes(20))
    return folder


def run(data, file, steps, samples=0, exclude="v1", ranks=1):
    """Run some steps from a position; returns the last loader."""
    for rank in range(ranks):
        loader = Loader(
            Dataset.open(data, exclude),
            global_batch=4,
            transform=Resize(4),
            rank=rank,
            world_size=ranks,
            quarantine=file,
        )
        loader.load_state_dict(loader.state_dict() | {"samples": samples})
        for _ in islice(loader, steps):
            pass
    return loader


def test_an_entry_says_where_the_image_lies_and_when_it_was_due(data, tmp_path):
    file = tmp_path / "run" / "quarantine.jsonl"
    loader = run(data, file, 8)
    entries = {(entry["shard"], entry["index"]): entry for entry in read_quarantine(file)}
    assert sorted(entries) == BROKEN
    raw, kept = Dataset.open(data), Dataset.open(data, "v1")
    for (shard, index), entry in entries.items():
        rows = raw.rows(shard)
        assert (entry["key"], entry["offset"]) == (rows.key[index], rows.offset[index])
        assert entry["tar"] == f"shards/{shard:06d}.tar"
        assert entry["key"] in entry["reason"]
        _, there, place = (int(x[0]) for x in loader.order.locate(np.array([entry["position"]])))
        assert (there, kept.rows(there).index[place]) == (shard, index)


def test_restarts_other_ranks_and_later_epochs_do_not_repeat_an_entry(data, tmp_path):
    file = tmp_path / "quarantine.jsonl"
    run(data, file, 8)
    before = file.read_bytes()
    assert before.count(b"\n") == len(BROKEN)
    run(data, file, 20, samples=0, ranks=2)
    run(data, file, 20, samples=40)
    assert file.read_bytes() == before
    file.write_bytes(before[:-30])  # a kill in the middle of a line
    run(data, file, 8)
    assert len(read_quarantine(file)) == len(BROKEN)
    assert file.read_bytes().startswith(before[:-30] + b"\n")


def test_samples_that_failed_as_stand_ins_are_listed_at_their_own_position(data, tmp_path):
    loader = run(data, tmp_path / "all.jsonl", 1)
    where = [tuple(int(x[0]) for x in loader.order.locate(np.array([p])))[1:] for p in (0, loader.order.stand_in(0, 1))]
    for shard, index in where:
        rows = Dataset.open(data, "v1").rows(shard)
        with open(data / manifest.shard_path(shard), "r+b") as tar:
            tar.seek(int(rows.offset[index]) + 30)
            tar.write(bytes(20))
    loader = Loader(
        Dataset.open(data, "v1"), global_batch=1, transform=Resize(4), quarantine=tmp_path / "one.jsonl", prefetch=0
    )
    next(iter(loader))
    entries = read_quarantine(tmp_path / "one.jsonl")
    assert [entry["position"] for entry in entries][:2] == [0, loader.order.stand_in(0, 1)]


def command(*arguments):
    done = CliRunner().invoke(app, ["shards", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(done.exception, PatchmillError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.stdout


def test_a_drop_list_is_made_of_what_runs_could_not_decode(data, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(data, one, 8)
    run(data, two, 8, exclude=None)
    code, said = command("drop", data, one, two, "--version", "v2", "--exclude", "v1")
    assert (code, said) == (0, "drop list v2 leaves out 6 samples, 3 of them new\n")
    listed = read_exclude(data, "v2")
    assert [row[:2] for row in listed] == sorted([*BROKEN, (0, 1), (0, 2), (2, 0)])
    assert [row for row in listed if row[:2] not in BROKEN] == read_exclude(data, "v1")
    assert all(f"s{shard}/{index}" in reason for shard, index, reason in listed if (shard, index) in BROKEN)
    assert run(data, tmp_path / "none.jsonl", 20, exclude="v2").replaced == 0
    assert not (tmp_path / "none.jsonl").exists()
    code, said = command("drop", data, one, "--version", "v3", "--json")
    assert json.loads(said) == {"exclude": "v3", "new": 3, "dropped": 3}


def test_a_mixture_lists_each_sample_by_its_own_data_set(data, tmp_path):
    whole = write_dataset(tmp_path / "whole", list("01234567"), [[Made(f"w{i}", plain((i, 0, 0))) for i in range(6)]])
    file = tmp_path / "quarantine.jsonl"
    mixed = Mixture([(Dataset.open(whole), 1), (Dataset.open(data), 1), (Dataset.open(whole), 1)])
    for _ in islice(Loader(mixed, global_batch=8, transform=Resize(4), quarantine=file), 30):
        pass
    entries = read_quarantine(file)
    assert sorted(place_of(entry) for entry in entries) == [(1, *place) for place in BROKEN]
    assert {(entry["data"], entry["tar"].startswith("shards/")) for entry in entries} == {(str(data), True)}
    other = entries[0] | {
        "data": str(whole),
        "source": 0,
        "shard": 0,
        "index": 3,
        "key": "w3",
        "offset": 3 * 1024 + 512,
    }
    with open(file, "a") as lines:
        lines.write(json.dumps(other) + "\n")
    assert command("drop", data, file, "--version", "v2")[1] == "drop list v2 leaves out 3 samples, 3 of them new\n"
    assert command("drop", whole, file, "--version", "v2")[1] == "drop list v2 leaves out 1 sample, 1 of them new\n"
    assert read_exclude(whole, "v2") == [(0, 3, other["reason"])]
    third = write_dataset(tmp_path / "third", ["0"], [[Made("t", plain((0, 0, 0)))]])
    assert f"names samples of {data} and {whole} only; give" in command("drop", third, file)[1]


def test_mistakes_are_told(data, tmp_path):
    file = tmp_path / "quarantine.jsonl"
    code, said = command("drop", data, file)
    assert (code, said) == (2, f"no file {file}; check the path (runs that meet no broken image write none)")
    file.touch()
    code, said = command("drop", data, file)
    assert (code, "names no sample; give the quarantine.jsonl" in said) == (2, True)
    run(data, file, 8)
    assert command("drop", data, file, "--version", "v1")[1].endswith("exists and never changes; choose another name")
    entry = read_quarantine(file)[0]
    for change in ({"key": "x"}, {"offset": 7}, {"shard": 9}, {"index": 8}, {"index": -1}):
        file.write_text(json.dumps(entry | change) + "\n")
        code, said = command("drop", data, file)
        assert (code, "is of another data set than" in said) == (2, True)
    file.write_text(json.dumps({"shard": 0, "index": 1}) + "\n")
    assert "has an entry without data" in command("drop", data, file)[1]
    assert Dataset.open(data).exclude_versions() == ["v1"]
