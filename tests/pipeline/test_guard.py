"""The guard beside a NumPy version of its rule, and what it must and must not take for a leap."""

import json
import math

import numpy as np
import pytest
import torch

from pipeline.guard import Guard

CPU = torch.device("cpu")


def judge(guard, losses, norms):
    return [bool(guard(torch.tensor(loss), torch.tensor(norm))) for loss, norm in zip(losses, norms, strict=True)]


def by_hand(losses, norms, sigmas):
    """Judge the steps with sums over all that came before, each with the weight that it has by now."""
    seen, found = [], []
    for values in zip(losses, norms, strict=True):
        logs = np.log(values)
        limits = np.full(2, np.inf)
        weights = 0.99 ** np.arange(len(seen) - 1, -1, -1)
        if len(seen) >= 100:
            past = np.array(seen)
            mean = np.average(past, axis=0, weights=weights)
            deviation = np.sqrt(np.average((past - mean) ** 2, axis=0, weights=weights))
            limits = mean + sigmas * np.maximum(deviation, 0.1)
        found.append(bool((logs > limits).any()))
        seen.append(np.minimum(logs, limits))
    return found


def noisy(count, seed=0):
    random = np.random.default_rng(seed)
    return 2.5 * np.exp(0.2 * random.standard_normal((count, 2)))


def test_leaps_are_those_of_the_rule():
    values = noisy(300)
    values[[50, 120, 121, 200, 260], [0, 0, 1, 1, 0]] *= (50, 50, 50, 4, 1.5)
    guard = Guard(3.0, CPU)
    found = judge(guard, *values.T)
    assert found == by_hand(*values.T, 3.0)
    assert {120, 121, 200} <= set(np.flatnonzero(found))
    assert not found[50]  # too early to tell


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_held_back_from_the_first_step_and_teaches_nothing(bad):
    guard, other = Guard(8.0, CPU), Guard(8.0, CPU)
    assert judge(guard, [bad, 1.0], [1.0, bad]) == [True, True]
    values = noisy(150)
    assert judge(guard, *values.T) == judge(other, *values.T) == [False] * 150
    assert judge(guard, [1000.0], [1.0]) == [True]
    assert judge(Guard(0, CPU), [bad], [1.0]) == [True]


def test_a_lasting_change_is_soon_the_new_normal_and_no_sigmas_judge_nothing():
    values = noisy(200)
    values[150:] *= 1000
    assert judge(Guard(0, CPU), *values.T) == [False] * 200
    found = judge(Guard(8.0, CPU), *values.T)
    assert found[150]
    assert sum(found) < 15
    assert not any(found[170:])


def test_it_goes_on_from_a_checkpoint_to_the_bit():
    values = noisy(240)
    whole, first, second = (Guard(2.0, CPU) for _ in range(3))
    judge(first, *values[:130].T)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert judge(whole, *values.T)[130:] == judge(second, *values[130:].T)
    assert whole.state_dict() == second.state_dict()


def test_integers_on_a_loss_of_zero():
    assert judge(Guard(8.0, CPU), [0.0] * 200, [0.0] * 200) == [False] * 200
