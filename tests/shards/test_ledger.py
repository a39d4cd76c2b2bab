"""The ledger says what came, whatever kills and restarts."""

import sys
import threading

import numpy as np
import pytest

from shards import ledger
from shards.audit import Source, audit
from shards.augment import Resize
from shards.dataset import Dataset
from shards.errors import PatchmillError, UserError
from shards.ledger import RankFile, new_segment, rank_path, read_frame
from shards.loader import Loader
from tests.shards.stage import A_SHARD, BATCH, SAMPLES, Stage, frames, write_numbered


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("whole"))


def numbers(stage: Stage) -> dict[int, int]:
    """Return the sample at each position as the ledger's last segment of a single start tells."""
    found = {}
    for path in sorted((stage.folder / "ledger").glob("*/rank-*.ledger")):
        ranks = RankFile(path).head["world_size"]
        for frame in frames(path):
            positions = range(frame.first, frame.first + ranks * len(frame.shard), ranks)
            found |= dict(zip(positions, (frame.shard * A_SHARD + frame.index).tolist(), strict=True))
    return found


@pytest.mark.parametrize("rows", [1, 5, 1 << 16])
def test_the_ledger_holds_what_came(whole, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(ledger, "FRAME_ROWS", rows)
    stage = Stage(tmp_path, whole)
    stage.start(2, steps=30)
    stage.end()
    assert numbers(stage) == stage.came
    assert sorted(stage.came) == list(range(30 * BATCH))
    found = audit(tmp_path)
    assert (found.counts, found.misfits, found.ranks) == ({}, [], [2])
    assert (found.positions, found.sources) == (180, [Source(str(whole), SAMPLES, 3)])
    assert (found.stand_ins, found.replaced) == (0, 0)


def test_a_frame_cut_anywhere_leaves_the_frames_before_it(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "FRAME_ROWS", 2 * BATCH)
    stage = Stage(tmp_path, whole)
    stage.start(1, steps=6)
    stage.end()
    path = rank_path(tmp_path / "ledger" / "000000", 0)
    file, data = RankFile(path), path.read_bytes()
    assert file.first.tolist() == [0, 12, 24]
    assert file.last.tolist() == [11, 23, 35]
    ends = [*file.offset.tolist(), len(data)]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        if cut < ends[0]:
            with pytest.raises(PatchmillError, match="cannot be read"):
                RankFile(path)
            continue
        there = sum(end <= cut for end in ends[1:])
        assert RankFile(path).offset.tolist() == ends[:there]
        assert RankFile(path).torn == (cut not in ends)
    path.write_bytes(data + bytes(300))  # a file that grew before its content came
    assert RankFile(path).offset.tolist() == ends[:-1]


def test_a_stream_that_is_set_in_between_begins_a_segment(whole, tmp_path):
    stage = Stage(tmp_path, whole)
    stage.start(1, steps=4)
    stage.save()
    (loader,), (batches,) = stage.loaders, stage.batches
    state = loader.state_dict()
    for _ in range(3):
        next(batches)
    loader.load_state_dict(state)
    for _ in range(2):
        next(batches)
    loader.samples = 12  # by hand, as nobody should
    for _ in range(6):
        next(batches)
    stage.end()
    heads = [RankFile(rank_path(path, 0)).head for path in sorted((tmp_path / "ledger").iterdir())]
    assert [(head["begins"], head["after"]) for head in heads] == [(0, None), (24, "000000"), (12, "000000.2")]
    found = audit(tmp_path)
    assert found.counts == {"record": 1}
    assert "begins at position 24, behind 12" in found.misfits[0].reason


def test_two_processes_never_write_one_file(whole, tmp_path):
    segment = new_segment(tmp_path)
    assert (segment.name, new_segment(tmp_path).name) == ("000000", "000001")
    dataset = Dataset.open(whole)
    first, second = (Loader(dataset, global_batch=4, transform=Resize(4), ledger=segment) for _ in range(2))
    next(iter(first))
    with pytest.raises(UserError, match=r"rank-00000.ledger exists: another process writes"):
        next(iter(second))


def test_a_ledger_that_cannot_be_written_ends_the_run(whole, tmp_path):
    (tmp_path / "000000").write_text("a file where the folder should be")
    loader = Loader(Dataset.open(whole), global_batch=4, transform=Resize(4), ledger=tmp_path / "000000")
    with pytest.raises(PatchmillError, match=r"cannot write .*: .*; make room or mend the disk"):
        next(iter(loader))


def test_a_checkpoint_makes_durable_what_came_before_it(whole, tmp_path):
    loader = Loader(Dataset.open(whole), global_batch=4, transform=Resize(4), ledger=new_segment(tmp_path))
    batches = iter(loader)
    next(batches)
    path = rank_path(tmp_path / "000000", 0)
    assert RankFile(path).last.tolist() == []
    assert loader.state_dict()["ledger"] == "000000"
    assert RankFile(path).last.tolist() == [3]
    next(batches)
    batches.close()
    assert RankFile(path).last.tolist() == [3, 7]


def test_checkpoints_are_taken_while_another_thread_fetches(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "FRAME_ROWS", 3 * BATCH)
    stage = Stage(tmp_path, whole)
    stage.start(1, steps=1)
    (loader,), (batches,) = stage.loaders, stage.batches
    thread = threading.Thread(target=lambda: [next(batches) for _ in range(300)])
    thread.start()
    while thread.is_alive():
        loader.state_dict()
    stage.end()
    assert audit(tmp_path).counts == {}
    assert audit(tmp_path).positions == 301 * BATCH


def test_a_state_asked_for_while_another_thread_takes_batches_loses_nothing(whole, tmp_path):
    loader = Loader(
        Dataset.open(whole, "v1"),
        global_batch=BATCH,
        transform=Resize(4),
        stop=300 * BATCH,
        ledger=new_segment(tmp_path),
    )
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        taker = threading.Thread(target=lambda: list(loader))
        taker.start()
        while taker.is_alive():
            assert loader.state_dict()["samples"] % BATCH == 0
        taker.join()
    finally:
        sys.setswitchinterval(before)
    path = rank_path(tmp_path / "000000", 0)
    frames = [read_frame(path, int(offset)) for offset in RankFile(path).offset]
    assert [frame.first for frame in frames] == np.cumsum([0, *(len(frame.shard) for frame in frames)])[:-1].tolist()
    assert sum(len(frame.shard) for frame in frames) == 300 * BATCH
