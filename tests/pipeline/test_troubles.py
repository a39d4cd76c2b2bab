"""Trouble in a real run: batches that give no finite loss are skipped, named, and passed over after a rollback."""

import gc
import json
import math
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import stop
from pipeline import train as train_module
from pipeline.checkpoint import newest
from pipeline.config import TrainSettings
from pipeline.microbatch import seed_dropout
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check, merge
from pipeline.train import train
from pipeline.troubles import Troubles
from pipeline.window import Taken
from shards.audit import audit
from shards.build import build
from shards.dataset import Dataset
from shards.errors import PatchmillError, StoppedOnRequestError
from tests.pipeline.parameters import parameters
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
               for weight in parameters(newest(tmp_path / "run" / "checkpoints")).values())  # fmt: skip


@pytest.mark.long
def test_several_in_a_row_go_back_and_are_passed_over(data, settings, poisoned, tmp_path):
    poisoned(80, 88, 96)
    result = train(settings(guard={"in_row": 3}), tmp_path / "run")
    # The 24 samples in question, and as many before them, from the checkpoint on.
    (interval,) = result["passed_over"]
    assert (interval["from"], interval["to"], interval["checkpoint"]) == (72, 104, "samples-000000000072")
    assert json.loads((tmp_path / "run" / "passed_over.json").read_text()) == result["passed_over"]
    assert result["samples"] == 160
    assert result["steps"] == 9 + 7  # up to 72, and from 104
    assert result["skipped"] == 3  # they were, before the rollback
    assert [line["from"] for line in lines(tmp_path / "run" / "skipped.jsonl")] == [80, 88, 96]
    found = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["samples"] for line in found] == list(range(8, 168, 8))  # each once
    assert [line["loss"] is None for line in found] == [72 < line["samples"] <= 104 for line in found]
    assert audit(tmp_path / "run").counts == {}  # all were read, each once

    # Another run that never saw those batches ends with the same weights.
    poisoned()
    train(settings(checkpoint={"keep": 9}), tmp_path / "other")
    for path in (tmp_path / "other" / "checkpoints").glob("samples-*"):
        if int(path.name[-4:]) > 72:
            shutil.rmtree(path)
    (tmp_path / "other" / "passed_over.json").write_text(json.dumps([interval]))
    train(settings(), tmp_path / "other")
    one, other = (parameters(newest(tmp_path / run / "checkpoints")) for run in ("run", "other"))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.long
def test_a_rollback_under_zero_3_ends_as_without_it(settings, poisoned, tmp_path):
    poisoned(80, 88, 96)
    over = {"engine": {"kind": "deepspeed", "zero_stage": 3}, "guard": {"in_row": 3}}
    ends = [train(settings(**over), tmp_path / "sharded"), train(settings(guard=over["guard"]), tmp_path / "whole")]
    assert ends[0]["passed_over"] == ends[1]["passed_over"]
    assert len(ends[0]["passed_over"]) == 1
    one, other = (parameters(newest(tmp_path / run / "checkpoints")) for run in ("sharded", "whole"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("engine", [{"kind": "accelerate"}, *({"zero_stage": stage} for stage in (0, 1, 2, 3))])
def test_the_engine_is_gone_when_a_rollback_makes_another(settings, poisoned, tmp_path, monkeypatch, engine):
    poisoned(80, 88, 96)
    create, before, left = train_module.create_engine, [], []

    def counted(*arguments):
        gc.collect()
        left.append(sum(each().untyped_storage().nbytes() for each in before if each() is not None))
        made = create(*arguments)
        tensors = [*made.model.parameters(), *(getattr(p, "ds_tensor", p) for p in made.model.parameters())]
        before.extend(weakref.ref(tensor) for tensor in tensors)
        return made

    monkeypatch.setattr(train_module, "create_engine", counted)
    train(settings(engine={"kind": "deepspeed", **engine}, guard={"in_row": 3}), tmp_path / "run")
    assert left == [0, 0]


@pytest.mark.long
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


def test_a_row_inside_a_window_counts_though_better_steps_follow(settings, poisoned, tmp_path):
    poisoned(32, 40, 48)
    over = {"log_every": "80 samples", "checkpoint": {"every": "80 samples"}, "guard": {"in_row": 3, "then": "stop"}}
    with pytest.raises(PatchmillError, match=r"3 steps in a row were skipped up to 56 samples"):
        train(settings(**over), tmp_path / "run")


def test_before_the_first_checkpoint_it_stops_and_what_an_older_run_left_is_forgotten(settings, poisoned, tmp_path):
    poisoned(32, 40)
    out = tmp_path / "run"
    out.mkdir()
    (out / "passed_over.json").write_text(json.dumps([{"from": 8, "to": 48, "checkpoint": "x", "reason": ""}]))
    (out / "skipped.jsonl").write_text('{"from": 8, "to": 16}\n')
    with pytest.raises(PatchmillError, match=r"2 steps in a row were skipped up to 48 .* it goes on from the start"):
        train(settings(checkpoint={"every": "160 samples"}, guard={"in_row": 2}), out)
    assert not (out / "passed_over.json").exists()
    assert [line["from"] for line in lines(out / "skipped.jsonl")] == [32, 40]


def test_the_end_is_saved_and_a_save_that_was_due_at_a_skipped_step_is_made_up_for(settings, poisoned, tmp_path):
    poisoned(40, 152)
    result = train(settings(checkpoint={"every": "48 samples", "keep": 9}), tmp_path / "run")
    assert result["checkpoint"].endswith("samples-000000000160")
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("samples-*"))
    assert [int(name[-4:]) for name in saved] == [56, 96, 144, 160]  # 56 for 48, which was held back


def test_a_batch_that_holds_some_of_an_interval_is_passed_over(settings, poisoned, tmp_path):
    train(settings(duration="24 samples"), tmp_path / "run")
    interval = {"from": 40, "to": 48, "checkpoint": "x", "reason": ""}
    (tmp_path / "run" / "passed_over.json").write_text(json.dumps([interval]))
    result = train(
        settings(global_batch=24, duration="144 samples", checkpoint={"every": "48 samples"}), tmp_path / "run"
    )
    assert (result["samples"], result["steps"]) == (144, 3 + 4)  # 48 to 72 and on, not 24 to 48


def test_what_was_skipped_after_the_checkpoint_is_in_the_ledger_once(settings, poisoned, tmp_path):
    poisoned(16, 40)
    train(settings(duration="48 samples"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "samples-000000000048")  # as if killed before it was written
    assert train(settings(duration="64 samples"), tmp_path / "run")["skipped"] == 2
    assert [line["from"] for line in lines(tmp_path / "run" / "skipped.jsonl")] == [16, 40]


def step(number, loss, norm, applied=False):
    return Taken(8 * number, loss, norm, applied)


def test_loss_scaling_is_no_trouble_and_all_else_is(settings, tmp_path):
    def skipped(name, *steps, precision="float16"):
        (tmp_path / name).mkdir()
        low = settings(guard={"in_row": 99})
        low = low.model_copy(update={"engine": low.engine.model_copy(update={"precision": precision})})
        troubles = Troubles(low, tmp_path / name, lambda positions: iter(()), 0)
        for each in steps:  # a window of each
            troubles.note([each], None)
        return troubles.skipped

    inf, nan = math.inf, math.nan
    overflows = [step(number, 2.0, inf) for number in range(1, 31)]
    assert skipped("search", *overflows[:24], step(25, 2.0, 1.0, applied=True), *overflows[:24]) == 0
    assert skipped("never ends", *overflows) == 6
    assert skipped("leaps", step(1, 1e6, 1e4), step(2, nan, nan), step(3, 2.0, inf)) == 2
    assert skipped("bfloat16", *overflows, precision="bfloat16") == 30


def test_a_stream_cannot_go_back(settings, tmp_path):
    troubles = Troubles(settings(guard={"in_row": 2}), tmp_path, None, 0)
    with pytest.raises(PatchmillError, match=r"2 steps in a row .* it goes on from samples-000000000008"):
        troubles.note([step(2, math.nan, 1.0), step(3, math.nan, 1.0)], Path("samples-000000000008"))


def test_a_stop_that_was_asked_for_before_the_first_step(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(stop, "_asked", True)
    with pytest.raises(
        StoppedOnRequestError, match="stopped on request at 0 samples, before the first checkpoint; run"
    ):
        train(settings(), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "stopped.json").read_text()) == {"samples": 0, "checkpoint": None}
    monkeypatch.setattr(stop, "_asked", False)
    assert train(settings(duration="24 samples"), tmp_path / "run")["samples"] == 24


def test_dropout_is_seeded_as_by_torch():
    seed_dropout(7)
    ours = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(ours, torch.rand(3))
