"""The audit follows the weights, and finds whatever does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launch.cli import app
from shards import ledger
from shards.audit import audit, audit_span
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import PatchmillError, UserError
from shards.ledger import RankFile, rank_path
from shards.quarantine import read_quarantine
from tests.shards.datasets import Made, damage, plain, write_dataset
from tests.shards.stage import A_SHARD, DROPPED, SAMPLES, SHARDS, Stage, frames, rewrite, write_numbered

BROKEN = [(1, 0), (3, 4), (3, 5)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A small data set with some of the classes of the others."""
    folder = tmp_path_factory.mktemp("few")
    made = [[Made(f"few{i:02d}", plain((i, 0, 7 * i)), (i,)) for i in range(a, b)] for a, b in ((0, 5), (5, 12))]
    write_dataset(folder, [f"class{n}" for n in range(12)], made)
    write_exclude(folder, "v1", [(1, 3, "test")])
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Three images are broken: two neighbours, and the first of a shard."""
    folder = write_numbered(tmp_path_factory.mktemp("broken"))
    damage(folder, BROKEN)
    return folder


starts = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 3]),  # ranks
        st.integers(1, 12),  # steps
        st.sets(st.integers(0, 11), max_size=3),  # saves after these
        st.integers(0, 2),  # resumed from so many checkpoints before the last
        st.integers(0, 300),  # bytes of a torn frame
        st.sampled_from([6, 12, 18]),  # global batch
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12)
@given(starts=starts, rows=st.sampled_from([1, 7, 1 << 16]), kind=st.sampled_from(["whole", "broken", "mixed"]))
def test_whatever_is_killed_and_rolled_back_the_audit_follows_the_weights(
    whole, broken, few, tmp_path_factory, starts, rows, kind
):
    folder = tmp_path_factory.mktemp("run")
    stage = Stage(folder, *{"whole": [whole], "broken": [broken], "mixed": [broken, few]}[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "FRAME_ROWS", rows)
        for ranks, steps, saves, back, torn, batch in starts:
            stage.start(ranks, steps, saves, back, batch)
            stage.kill(torn)
        stage.start(2, steps=10, back=starts[0][3])
        stage.end()
        patch.setattr("shards.audit._LEAST_SPAN", 1)
        patch.setattr("shards.audit.FRAME_ROWS", rows)
        found = audit(folder)
    assert found.misfits == []
    assert found.positions == len(stage.came)
    if kind == "mixed":
        assert [source.samples for source in found.sources] == [SAMPLES, 11]
        assert sum(source.epochs * source.samples for source in found.sources) <= found.positions
    else:
        (source,) = found.sources
        assert (source.samples, source.epochs) == (SAMPLES, found.positions // SAMPLES)
        epochs = [sorted(n for p, n in stage.came.items() if p // SAMPLES == e) for e in range(source.epochs)]
        kept = [s * A_SHARD + i for s in range(SHARDS) for i in range(A_SHARD) if (s, i) not in DROPPED]
        gone = {s * A_SHARD + i for s, i in BROKEN} if kind == "broken" else set()
        assert all(set(epoch) == set(kept) - gone for epoch in epochs)
        assert all(epoch == kept for epoch in epochs if not gone)
        assert found.stand_ins >= len(gone) * source.epochs
    shutil.rmtree(folder)


def test_a_subset_is_audited_as_the_run_had_it(whole, tmp_path):
    stage = Stage(tmp_path, whole, subset=20)
    size = len(stage.open())
    assert 20 <= size < 29
    stage.start(2, steps=10)
    stage.end()
    found = audit(tmp_path)
    assert found.misfits == []
    (source,) = found.sources
    assert (source.samples, source.epochs) == (size, 60 // size)


@pytest.fixture(scope="module")
def ran(whole, broken, tmp_path_factory):
    """Stages that ran 3 epochs and some steps, without and with broken images; copy them before you change them."""
    made = []
    for data in (whole, broken):
        stage = Stage(tmp_path_factory.mktemp("ran"), data)
        stage.start(2, steps=14)
        stage.save()
        stage.kill()
        stage.start(3, steps=13)
        stage.end()
        made.append(stage.folder)
    return made


@pytest.fixture
def fine(ran, tmp_path):
    return Path(shutil.copytree(ran[0], tmp_path / "fine"))


@pytest.fixture
def mended(ran, tmp_path):
    return Path(shutil.copytree(ran[1], tmp_path / "mended"))


def misfits(folder: Path) -> dict[str, list[str]]:
    found = audit(folder)
    named: dict[str, list[str]] = {}
    for each in found.misfits:
        named.setdefault(each.kind, []).append(each.reason)
    assert {kind: len(reasons) for kind, reasons in named.items()} == found.counts
    return named


def test_a_row_that_is_gone_is_a_gap(fine):
    path = rank_path(fine / "ledger" / "000000", 0)
    lost = frames(path)[0]
    rewrite(path, lambda f: [f._replace(shard=f.shard[:-1], index=f.index[:-1])])
    sample = f"sample {lost.index[-1]} of shards/{lost.shard[-1]:06d}.tar"
    assert misfits(fine) == {"gap": ["position 82: nothing came"], "missing": [f"epoch 1: {sample} did not come"]}


def test_rows_that_are_gone_from_the_middle_are_a_gap(fine):
    def change(frame):
        first, then = slice(0, 20), slice(22, None)
        return [
            frame._replace(shard=frame.shard[first], index=frame.index[first]),
            frame._replace(first=frame.first + 44, shard=frame.shard[then], index=frame.index[then]),
        ]

    rewrite(rank_path(fine / "ledger" / "000000", 1), change)
    found = misfits(fine)
    assert found["gap"] == ["position 41: nothing came", "position 43: nothing came"]
    assert [len(found[kind]) for kind in ("gap", "missing")] == [2, 2]


def test_a_row_that_came_twice_is_a_duplicate(fine):
    again = rank_path(fine / "ledger" / "000001", 2)
    frame = frames(again)[0]
    rewrite(again, lambda f: [f, f._replace(shard=f.shard[:1], index=f.index[:1])])
    sample = f"sample {frame.index[0]} of shards/{frame.shard[0]:06d}.tar"
    assert frame.first == 86
    assert misfits(fine) == {
        "duplicate": [f"position 86: {sample} came after another one"],
        "repeated": [f"epoch 1: {sample} came again at position 86"],
    }


def test_another_sample_in_the_place_of_one_is_told_three_times(fine):
    path = rank_path(fine / "ledger" / "000001", 1)

    def change(frame):
        frame.shard[4], frame.index[4] = frame.shard[1], frame.index[1]
        return [frame]

    before = frames(path)[0]
    rewrite(path, change)
    gone, twice = (f"sample {before.index[i]} of shards/{before.shard[i]:06d}.tar" for i in (4, 1))
    at = before.first + 12
    assert misfits(fine) == {
        "wrong": [f"position {at}: {twice} came, {gone} was due"],
        "missing": [f"epoch 1: {gone} did not come"],
        "repeated": [f"epoch 1: {twice} came again at position {at}"],
    }


def test_two_samples_that_changed_places_are_wrong_though_each_came_once(fine):
    path = rank_path(fine / "ledger" / "000000", 0)

    def change(frame):
        for column in (frame.shard, frame.index):
            column[[2, 3]] = column[[3, 2]]
        return [frame]

    rewrite(path, change)
    found = misfits(fine)
    assert list(found) == ["wrong"]
    assert [reason.split(":")[0] for reason in found["wrong"]] == ["position 4", "position 6"]


@pytest.mark.parametrize("place", [(0, 2), (0, 99), (77, 0), (-1, 0)])
def test_a_dropped_sample_and_one_that_is_not_there_are_wrong(fine, place):
    def change(frame):
        frame.shard[0], frame.index[0] = place
        return [frame]

    rewrite(rank_path(fine / "ledger" / "000000", 0), change)
    found = misfits(fine)
    assert [len(found[kind]) for kind in found] == [1, 1]
    what = "sample 2 of shards/000000.tar" if place == (0, 2) else "a sample that is not in the data set"
    assert found["wrong"][0].startswith(f"position 0: {what} came, sample ")
    assert found["missing"][0].startswith("epoch 0: sample ")


def test_stand_ins_are_explained_by_the_quarantine_list(mended):
    found = audit(mended)
    assert found.misfits == []
    assert (found.stand_ins, found.replaced) == (
        len(BROKEN) * 3,
        len(BROKEN),
    )  # 3 epochs, and 12 samples of one that none is of
    (mended / "quarantine.jsonl").rename(mended / "elsewhere")
    assert audit(mended).counts == {"stand-in": found.stand_ins}
    reasons = misfits(mended)["stand-in"]
    assert all("which is not on the quarantine list" in reason for reason in reasons)


def test_a_stand_in_that_is_not_marked_or_not_the_orders_is_told(mended):
    path = rank_path(mended / "ledger" / "000000", 0)
    frame = frames(path)[0]
    row = int(frame.replaced[0, 0])
    at = frame.first + 2 * row
    rewrite(path, lambda f: [f._replace(replaced=f.replaced[1:])])
    found = misfits(mended)
    assert [reason for reason in found["stand-in"] if f"position {at}: " in reason and "not marked" in reason]
    assert {"stand-in", "missing", "repeated"} <= found.keys()

    def other(f):
        f.shard[row], f.index[row] = 0, 0
        return [f._replace(replaced=np.concatenate([frame.replaced[:1], f.replaced]))]

    rewrite(path, other)
    (reason,) = misfits(mended)["stand-in"]
    assert reason.startswith(f"position {at}: sample 0 of shards/000000.tar came in place of sample ")
    assert reason.endswith("was due as its stand-in")


def test_of_the_stand_ins_in_turn_only_the_first_whole_one_will_do(mended, broken):
    path, dataset = rank_path(mended / "ledger" / "000000", 0), Dataset.open(broken, "v1")
    frame, order = frames(path)[0], dataset.order(3)
    row = int(frame.replaced[0, 0])
    turns = np.array([order.stand_in(frame.first + 2 * row, attempt) for attempt in range(1, 6)])
    _, shards, kept = (each.tolist() for each in order.locate(turns))
    places = [(s, int(dataset.rows(s).index[i])) for s, i in zip(shards, kept, strict=True)]
    first, second = [place for place in places if place not in BROKEN][:2]
    assert (frame.shard[row], frame.index[row]) == first

    def change(f):
        f.shard[row], f.index[row] = second
        return [f]

    rewrite(path, change)
    (reason,) = misfits(mended)["stand-in"]
    assert reason.endswith(f"but sample {first[1]} of shards/{first[0]:06d}.tar was due as its stand-in")


def test_a_sample_on_the_quarantine_list_that_came_all_the_same_is_told(mended):
    entries = read_quarantine(mended / "quarantine.jsonl")
    assert {(each["shard"], each["index"]) for each in entries} == set(BROKEN)
    with open(mended / "quarantine.jsonl", "a") as file:
        file.write(json.dumps(entries[0] | {"shard": 2, "index": 2, "position": 7}) + "\n")
    assert misfits(mended) == {
        "quarantine": ["position 7: sample 2 of shards/000002.tar is listed, but no stand-in came"]
    }


def test_files_that_are_missing_or_damaged_are_told(fine):
    path = rank_path(fine / "ledger" / "000001", 1)
    data = path.read_bytes()
    offset = int(RankFile(path).offset[0])
    path.write_bytes(data[: offset + 60] + bytes([data[offset + 60] ^ 1]) + data[offset + 61 :])
    found = audit(fine)
    assert found.counts == {"record": 1, "gap": 26, "missing": 22}  # 4 gaps in the last epoch, which is not whole
    assert found.misfits[0].reason == f"{path} is damaged at byte {offset}: the checksum is another one"
    path.write_bytes(data[:-1])
    found = audit(fine)
    assert found.counts["gap"] == 26
    assert found.misfits[0].reason == f"{path} is no ledger any more behind byte {offset}"
    path.write_bytes(b"x" + data[1:])
    assert {each.reason for each in audit(fine).misfits if each.kind == "record"} == {
        f"{path} cannot be read: no whole frame there",
        f"{path.parent} has no file of rank 1 of 3",
    }
    path.unlink()
    assert audit(fine).counts == {"record": 1, "gap": 26, "missing": 22}
    shutil.copy(rank_path(fine / "ledger" / "000000", 1), path)
    reasons = {each.reason for each in audit(fine).misfits if each.kind == "record"}
    assert f"{path} does not belong to the other files of its segment" in reasons
    shutil.rmtree(fine / "ledger" / "000000")
    assert "segment 000000 has no file that can be read" in {each.reason for each in audit(fine).misfits}
    shutil.rmtree(fine / "ledger")
    with pytest.raises(UserError, match=r"no ledger in .* for samples-000000000162: segment 000001 has no file"):
        audit(fine)


@pytest.mark.parametrize("told", [{"data": ["http://[::1"]}, {"subset": ["x"]}, {"exclude": ["\0"]}, {"data": ["\0"]}])
def test_a_head_that_names_no_data_sets_is_one_line(fine, told):
    for path in (fine / "ledger").glob("*/rank-*.ledger"):
        file, data = RankFile(path), path.read_bytes()
        head = json.dumps(file.head | {"run": file.head["run"] | told}).encode()
        path.write_bytes(ledger._frame((0, 0, 0, 0, 0), head) + data[file.offset[0] :])
    with pytest.raises(UserError, match="cannot be read"):
        audit(fine)


def audit_command(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["shards", "audit", *map(str, arguments)])
    if isinstance(done.exception, PatchmillError):
        return done.exception.exit_code, str(done.exception)
    return done.exit_code, done.stdout


def test_the_command_says_it_in_words_and_in_json(fine, mended):
    code, said = audit_command(mended)
    assert code == 0
    assert "162 positions to " in said
    assert f"samples-000000000162, from 2 starts on 2, 3 ranks\n3 whole epochs of {SAMPLES} samples: " in said
    assert "9 stand-ins for 3 samples on the quarantine list\nit fits:" in said
    code, said = audit_command(fine / "checkpoints" / "samples-000000000084", "--json")
    said = json.loads(said)
    assert code == 0
    assert [said[name] for name in ("positions", "ranks", "counts")] == [84, [2], {}]
    assert [(source["samples"], source["epochs"]) for source in said["sources"]] == [(SAMPLES, 1)]

    rewrite(rank_path(fine / "ledger" / "000000", 0), lambda f: [f._replace(shard=f.shard[5:], index=f.index[5:])])
    code, said = audit_command(fine)
    assert code == 1
    assert "gap: nothing came for a position, 5 times\n  position 74: nothing came\n" in said
    assert said.count("wrong: another sample came than was due, 37 times") == 1
    assert said.endswith("it does not fit\n")
    code, said = audit_command(fine, "--json")
    assert (code, json.loads(said)["counts"]["wrong"]) == (1, 37)


def test_mistakes_are_told_in_a_line(fine, whole, broken, tmp_path):
    assert audit_command(tmp_path)[0] == 2
    assert "has no checkpoint; give the folder of a training stage" in audit_command(tmp_path)[1]
    assert audit_command(fine, "--workers", "0") == (2, "--workers 0: must be at least 1")
    assert "is not the data set of the run" in audit_command(fine, "--data", other_data(tmp_path))[1]
    moved = shutil.copytree(whole, tmp_path / "moved")
    assert audit_command(fine, "--data", moved, "--workers", "2")[0] == 0
    file = fine / "checkpoints" / "samples-000000000162" / "checkpoint.json"
    file.write_text(json.dumps({"state": {"loader": {"samples": 3}}}))
    assert "tells no segment of a ledger" in audit_command(fine)[1]


def other_data(folder: Path) -> Path:
    made = [[Made(f"{i}", plain((i, 0, 0))) for i in range(4)]]
    write_dataset(folder / "other", ["a"], made)
    write_exclude(folder / "other", "v1", [])
    return folder / "other"


def test_an_order_of_another_version_is_refused(fine, monkeypatch):
    monkeypatch.setattr("shards.auditspan.ORDER_VERSION", 99)
    with pytest.raises(UserError, match="followed version 2 of the order, this Patchmill has 99"):
        audit(fine)


def test_large_data_are_audited_by_spans_on_several_processes(fine, monkeypatch):
    monkeypatch.setattr("shards.audit._LEAST_SPAN", 1)
    monkeypatch.setattr("shards.audit.FRAME_ROWS", 1)
    spans = []
    monkeypatch.setattr("shards.audit.audit_span", lambda job: spans.append((job.start, job.stop)) or audit_span(job))
    assert audit(fine).counts == {}
    assert spans == [(0, 50), (50, 100), (100, 150), (150, 162)]
    monkeypatch.setattr("shards.audit.audit_span", audit_span)
    assert audit(fine, workers=2).counts == {}
    path = rank_path(fine / "ledger" / "000000", 0)
    data = path.read_bytes()
    path.write_bytes(data[:-3] + bytes(3))  # a frame of two spans
    assert audit(fine).counts == {"record": 1, "gap": 42, "missing": 42}


@pytest.fixture(scope="module")
def mixed(broken, few, tmp_path_factory):
    """A stage on a mixture of 53 and 11 samples, 2 to 1, with broken images in the larger source; to be copied."""
    stage = Stage(tmp_path_factory.mktemp("mixed"), broken, few)
    stage.start(2, steps=20)
    stage.save()
    stage.kill()
    stage.start(1, steps=15)
    stage.end()
    return stage.folder


@pytest.mark.parametrize("span", [1, 1 << 22])
def test_each_source_of_a_mixture_has_epochs_of_its_own(mixed, broken, few, tmp_path, monkeypatch, span):
    """Also where its epochs go over the edges of what is audited together."""
    monkeypatch.setattr("shards.audit._LEAST_SPAN", span)
    monkeypatch.setattr("shards.audit.FRAME_ROWS", span)
    folder = Path(shutil.copytree(mixed, tmp_path / "mixed"))
    found = audit(folder)
    assert (found.counts, found.positions, found.replaced) == ({}, 210, len(BROKEN))
    assert [(source.url, source.samples) for source in found.sources] == [(str(broken), SAMPLES), (str(few), 11)]
    source, own = Stage(folder, broken, few).open().order(3).draw(np.arange(210))
    lacking = [min(set(range(211)) - set(own[source == s])) for s in (0, 1)]
    assert [source.epochs for source in found.sources] == [lacking[0] // SAMPLES, lacking[1] // 11]
    assert found.sources[1].epochs > 1
    assert audit(folder, workers=2).counts == {}

    path = rank_path(folder / "ledger" / "000000", 1)
    frame = frames(path)[0]
    first, later = np.flatnonzero(frame.shard >= SHARDS)[:2]

    def change(f):
        f.shard[first], f.index[first] = f.shard[later], f.index[later]
        return [f]

    rewrite(path, change)
    named = misfits(folder)
    gone = f"sample {frame.index[first]} of {few}/shards/{frame.shard[first] - SHARDS:06d}.tar"
    came = f"sample {frame.index[later]} of {few}/shards/{frame.shard[later] - SHARDS:06d}.tar"
    assert named["wrong"] == [f"position {2 * first + 1}: {came} came, {gone} was due"]
    assert named["missing"] == [f"epoch 0: {gone} did not come"]
    assert [reason.split(" again")[0] for reason in named["repeated"]] == [f"epoch 0: {came} came"]


def test_a_mixture_that_moved_is_named_whole(mixed, broken, few, tmp_path):
    moved = shutil.copytree(few, tmp_path / "moved")
    code, said = audit_command(mixed, "--data", moved)
    assert (code, said.startswith("--data is given 1 times, the run read 2: ")) == (2, True)
    assert audit_command(mixed, "--data", broken, "--data", moved)[0] == 0
    assert audit_command(mixed, "--data", moved, "--data", broken)[0] == 2
