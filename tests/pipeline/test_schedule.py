import re

import numpy as np
import pytest

from pipeline.config import TrainSettings
from pipeline.schedule import Schedule
from pipeline.settings import check, merge
from shards.errors import UserError

BASE = {"duration": "900 steps", "global_batch": 10, "data": {"train": "a"}, "model": {"name": "vit_b16"},
        "optim": {"lr": 1e-3}}  # fmt: skip


def settings(**over) -> TrainSettings:
    return check(TrainSettings, merge(BASE, over), "test")


def rates(steps: np.ndarray, **schedule) -> list[float]:
    """The rate of each step, the first being step 1."""
    planned = Schedule.of(settings(schedule={"warmup": "100 steps", **schedule}), 1000, 10)
    return [planned.rate(10 * int(step)) for step in steps]


@pytest.mark.parametrize(("shape", "end"), [("linear", 1e-5), ("linear", 0.0), ("cosine", 0.0)])
def test_follows_the_official_formulas(shape, end):
    """As ``create_learning_rate_schedule`` of the official code has them."""
    base, total, warmup = 1e-3, 900, 100
    steps = np.array([1, 2, 50, 99, 100, 101, 102, 500, 899, 900])
    progress = np.clip((steps - warmup) / float(total - warmup), 0.0, 1.0)
    lr = end + (base - end) * (1.0 - progress) if shape == "linear" else base * 0.5 * (1.0 + np.cos(np.pi * progress))
    lr = lr * np.minimum(1.0, steps / warmup)
    ours = rates(steps, shape=shape, end_lr=end)
    np.testing.assert_allclose(ours, lr, rtol=1e-12, atol=1e-18)
    assert ours[0] == pytest.approx(base / warmup)  # the first step learns something
    assert ours[4] == base
    assert ours[5] < base  # the peak is one step
    assert ours[-1] == pytest.approx(end, abs=1e-18)


def test_a_cosine_may_end_above_zero():
    assert rates(np.array([500, 900]), shape="cosine", end_lr=1e-4) == pytest.approx([(1e-3 + 1e-4) / 2, 1e-4])


def test_steps_are_bits_staircase():
    """As ``get_lr`` of the BiT code for more than 500,000 examples, but for its step 0, which learns nothing."""
    supports = [500, 6000, 12_000, 18_000, 20_000]

    def of_bit(step: int) -> float:
        lr = 0.003
        if step < supports[0]:
            return lr * step / supports[0]
        for support in supports[1:]:
            if support < step:
                lr /= 10
        return lr

    table = {"duration": "20_000 steps", "global_batch": 512, "optim": {"name": "sgd", "lr": 0.003}}
    table["schedule"] = {
        "shape": "steps", "warmup": "500 steps", "milestones": ["6000 steps", "12_000 steps", "18_000 steps"],
    }  # fmt: skip
    planned = Schedule.of(settings(**table), 1000, 512)
    edges = [edge + near for edge in supports[:-1] for near in (-1, 0, 1)]
    for step in (1, 250, *edges, 20_000):
        assert planned.rate(512 * step) == pytest.approx(of_bit(step), rel=1e-12), step


def test_milestones_and_factor_are_settings():
    planned = Schedule.of(
        settings(schedule={"shape": "steps", "milestones": ["2 epochs", "30 samples"], "factor": 0.5}), 20, 10
    )
    assert [planned.rate(seen) for seen in (10, 30, 31, 40, 41, 9000)] == pytest.approx(
        [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    )


def test_without_warm_up_it_starts_at_the_peak():
    planned = Schedule.of(settings(duration="1_000_000 steps", schedule={"shape": "cosine"}), 1000, 10)
    assert planned.rate(10) == pytest.approx(1e-3)


def test_a_warm_up_as_long_as_the_run_ends_at_the_peak():
    assert rates(np.array([450, 900]), shape="linear", warmup="900 steps") == pytest.approx([5e-4, 1e-3])


@pytest.mark.parametrize("shape", ["linear", "cosine", "steps"])
@pytest.mark.parametrize("unit", ["steps", "epochs", "samples"])
def test_another_global_batch_on_resume_leaves_the_rate_where_it_was(shape, unit):
    length = {"steps": 1, "epochs": 0.1, "samples": 10}[unit]
    table = {"duration": f"{900 * length:g} {unit}"}
    table["schedule"] = {"shape": shape, "warmup": f"{100 * length:g} {unit}"}
    if shape == "steps":
        table["schedule"]["milestones"] = [f"{300 * length:g} {unit}", f"{600 * length:g} {unit}"]
    before = Schedule.of(settings(**table), 100, 10)
    after = Schedule.of(settings(**table, global_batch=24, log_every="2 steps"), 100, first_batch=10)
    assert after.total == before.total == 9000
    for seen in range(24, 9100, 24):
        assert after.rate(seen) == before.rate(seen)
    assert after.periods["log"] == 48  # periods are of the steps that are taken
    assert [seen for seen in range(240, 360, 24) if after.due("log", seen)] == [240, 288, 336]


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"shape": "steps"}, 'goes down at milestones; set them, as in milestones = ["30 epochs"]'),
        ({"shape": "cosine", "milestones": ["1 epoch"]}, "set milestones = []"),
        ({"shape": "steps", "milestones": ["1 epoch"], "end_lr": 1e-5}, "unset end_lr"),
        ({"shape": "steps", "milestones": ["0 epochs"]}, "longer than nothing"),
        ({"shape": "constant"}, "'linear', 'cosine' or 'steps'"),
    ],
)
def test_schedules_that_do_not_fit_say_what_to_do(schedule, words):
    with pytest.raises(UserError, match=re.escape(words)):
        settings(schedule=schedule)
