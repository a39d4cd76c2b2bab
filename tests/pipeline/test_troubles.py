"""Trouble in a real run: batches that give no finite loss are skipped, named, and passed over after a rollback."""

import json

import numpy as np
import pytest
import torch

from pipeline import train as train_module
from pipeline.checkpoint import newest
from pipeline.config import TrainSettings, check, merge
from pipeline.objectives.supervised import Supervised
from pipeline.train import train
from shards.audit import audit
from shards.build import build
from shards.dataset import Dataset
from shards.errors import PatchmillError
from tests.shards.images import make_source

TABLE = {
    "duration": "160 samples", "global_batch": 8, "log_every": "1 step", "engine": {"kind": "accelerate"},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}, "data": {"resolution": 16},
    "checkpoint": {"every": "24 samples"},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("troubles")
    build(make_source(folder / "source", classes=2, each=20), folder / "set", shard_samples=13, workers=1)
    return folder / "set"


@pytest.fixture
def settings(data, alone):
    return lambda **over: check(TrainSettings, merge(merge(TABLE, {"data": {"train": str(data)}}), over), "test")


@pytest.fixture
def poisoned(monkeypatch):
    """Let the loss be no number for batches that begin at given positions."""

    def poison(*starts: int) -> None:
        class Poisoned(Supervised):
            def prepare(self, batch):
                bad = torch.full((len(batch.positions),), float("nan" if batch.positions.min() in starts else 0))
                return *super().prepare(batch), bad

            def loss(self, model, images, labels, bad):
                return super().loss(model, images, labels) + bad.mean()

        monkeypatch.setattr(train_module, "create_objective", lambda s, _, epoch, classes: Poisoned(s, epoch, classes))

    return poison


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_step_that_is_no_number_is_skipped_and_its_samples_are_named(data, settings, poisoned, tmp_path):
    poisoned(40)
    result = train(settings(), tmp_path / "run")
    assert (result["samples"], result["steps"], result["skipped"]) == (160, 20, 1)
    assert result["passed_over"] == []
    (entry,) = lines(tmp_path / "run" / "skipped.jsonl")
    dataset = Dataset.open(data)
    _, shards, indices = dataset.order(0, 16e9).locate(np.arange(40, 48))
    assert entry["samples"] == [
        {"tar": dataset.paths[shard], "key": dataset.read(shard, index).key}
        for shard, index in zip(shards.tolist(), indices.tolist(), strict=True)
    ]
    assert (entry["from"], entry["to"], entry["reason"]) == (40, 48, "the loss is nan")
    assert [line["skipped"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [0] * 5 + [1] * 15
    assert all(np.isfinite(np.frombuffer(weight.numpy().tobytes(), np.float32)).all()
               for _, weight in newest(tmp_path / "run" / "checkpoints").weights())  # fmt: skip


def test_several_in_a_row_go_back_and_are_passed_over(data, settings, poisoned, tmp_path):
    poisoned(80, 88, 96)
    result = train(settings(guard={"in_row": 3}), tmp_path / "run")
    # The 24 samples in question, and as many before them, from the checkpoint on.
    (interval,) = result["passed_over"]
    assert (interval["from"], interval["to"], interval["checkpoint"]) == (72, 104, "samples-000000000072")
    assert json.loads((tmp_path / "run" / "passed_over.json").read_text()) == result["passed_over"]
    assert result["samples"] == 160
    assert result["steps"] == 9 + 7  # up to 72, and from 104
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["samples"] for line in found] == list(range(8, 168, 8))  # each once
    assert [line["loss"] is None for line in found] == [72 < line["samples"] <= 104 for line in found]
    assert audit(tmp_path / "run").counts == {}  # all were read, each once

    # Another run that never saw those batches ends with the same weights.
    poisoned()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "passed_over.json").write_text(json.dumps([interval]))
    train(settings(), tmp_path / "other")
    for (name, one), (_, other) in zip(*(newest(tmp_path / run / "checkpoints").weights() for run in ("run", "other")),
                                       strict=True):  # fmt: skip
        assert torch.equal(one, other), name


def test_it_stops_if_told_to_and_when_nothing_helps(settings, poisoned, tmp_path):
    poisoned(*range(40, 240, 8))
    with pytest.raises(PatchmillError, match=r"2 steps in a row were skipped up to 56 samples: the loss is nan; lower"):
        train(settings(guard={"in_row": 2, "then": "stop"}), tmp_path / "stops")
    with pytest.raises(PatchmillError, match=r"5 steps in a row .* after 3 rollbacks to .*samples-0"):
        train(settings(duration="240 samples", checkpoint={"every": "240 samples"}), first(settings, tmp_path))
    assert len(json.loads((tmp_path / "run" / "passed_over.json").read_text())) == 3


def first(settings, tmp_path):
    """Return the folder of a run that has a checkpoint at 24 samples."""
    train(settings(duration="24 samples"), tmp_path / "run")
    return tmp_path / "run"
