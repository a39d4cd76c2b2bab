"""Ranks look up together, and what they then do between two log lines leaves the lines as they are."""

import json
from pathlib import Path

import pytest

from pipeline import lookout, stop
from pipeline.checkpoint import whole_checkpoints
from pipeline.config import TrainSettings
from pipeline.lookout import Lookout
from pipeline.settings import check, merge
from pipeline.train import train
from shards.build import build
from shards.errors import StoppedOnRequestError
from tests.ranks import run_on_ranks
from tests.shards.images import make_source

TABLE = {
    "duration": "24 steps", "global_batch": 8, "log_every": "7 steps", "engine": {"kind": "accelerate"},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}, "data": {"resolution": 16},
    "checkpoint": {"every": "12 steps", "keep": 99},
}  # fmt: skip


class Clock:
    """A clock that moves when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def looks(monkeypatch):
    """Steps at which the ranks looked up."""
    found, gather = [], lookout.distributed.gather_floats
    monkeypatch.setattr(lookout.distributed, "gather_floats", lambda mine: found.append(None) or gather(mine))
    return found


def walk(watch: Lookout, clock: Clock, looks: list, steps: int, seconds: float) -> list[int]:
    """Take steps of so many seconds; return after which of them was a look, counted from 1."""
    at = []
    for step in range(1, steps + 1):
        clock.now += seconds
        before = len(looks)
        watch.look()
        at += [step] * (len(looks) - before)
    return at


def test_they_look_every_five_seconds_as_counted_in_steps(alone, looks):
    clock = Clock()
    watch = Lookout(None, clock)
    assert walk(watch, clock, looks, 40, 0.5) == [1, 3, 7, 15, 25, 35]
    assert walk(watch, clock, looks, 12, 2.5) == [5, 8, 10, 12]  # slower: at the count of before, then at fewer
    assert walk(watch, clock, looks, 4, 30.0) == [2, 3, 4]


def test_a_stop_is_seen_at_a_look_and_at_once_where_told_to(alone, looks, monkeypatch):
    clock = Clock()
    watch = Lookout(None, clock)
    walk(watch, clock, looks, 25, 0.5)
    monkeypatch.setattr(stop, "_asked", True)
    clock.now += 0.5
    assert watch.look() == (False, False)
    assert watch.look(now=True) == (True, False)


def test_a_save_is_due_so_many_minutes_after_the_end_of_the_last(alone):
    clock = Clock()
    watch = Lookout(2.0, clock)
    found = []
    for _ in range(100):
        clock.now += 10.0
        seen = watch.look()
        if seen.save:
            found.append(clock.now)
            clock.now += 45.0  # it takes
            watch.saved()
    assert found == [120.0 + 165.0 * number for number in range(8)]


def test_ranks_whose_clocks_and_signals_differ_see_the_same_at_the_same_steps():
    first, second = run_on_ranks(Path(__file__).with_name("worker_lookout.py"), 2)
    assert first == second
    assert [save for _, _, save in first].count(True) >= 3
    stops = [step for step, stopping, _ in first if stopping]
    assert stops  # rank 1 alone was asked, at step 30
    assert 30 <= stops[0] < 60
    assert all(not stopping for step, stopping, _ in first if step < 30)


def lines(run: Path) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(each["samples"], each["step"], each["loss"], each["grad_norm"]) for each in found]


@pytest.mark.long
def test_a_run_saved_by_the_clock_and_stopped_between_two_lines_logs_the_same_lines(tmp_path, alone, monkeypatch):
    build(make_source(tmp_path / "source", classes=2, each=20), tmp_path / "set", shard_samples=13, workers=1)
    table = merge(TABLE, {"data": {"train": str(tmp_path / "set")}})
    train(check(TrainSettings, table, "test"), tmp_path / "undisturbed")
    expected = lines(tmp_path / "undisturbed")
    assert [samples // 8 for samples, *_ in expected] == [7, 12, 14, 21, 24]

    real, taken = Lookout.look, []

    def asked_between_two_lines(self, now=False):
        seen = real(self, now)
        taken.append(seen)
        return seen._replace(stop=True) if len(taken) == 18 else seen  # the first is before the first step

    monkeypatch.setattr(Lookout, "look", asked_between_two_lines)
    by_clock = check(TrainSettings, merge(table, {"checkpoint": {"minutes": 1e-9}}), "test")
    with pytest.raises(
        StoppedOnRequestError, match=r"stopped on request at 136 samples, saved in .*samples-000000000136"
    ):
        train(by_clock, tmp_path / "stopped")
    steps = sorted(int(each.name[8:]) // 8 for each in whole_checkpoints(tmp_path / "stopped/checkpoints"))
    assert 17 in steps  # between two lines, as are those that the clock asked for
    assert set(steps) - {7, 12, 14, 17}
    assert lines(tmp_path / "stopped") == expected[:3]
    train(by_clock, tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == expected
