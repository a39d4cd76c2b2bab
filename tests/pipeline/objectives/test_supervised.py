import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings, check
from pipeline.objectives.supervised import Supervised


def settings(**over) -> TrainSettings:
    base = {"duration": "1 step", "global_batch": 1, "data": {"train": "-"}, "model": {"name": "vit_b16"}}
    return check(TrainSettings, {**base, **over}, "test")


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_those_of_the_formulas(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4)).astype(np.float32), rng.integers(0, 4, 6)
    batch = (torch.from_numpy(logits), torch.from_numpy(labels))
    targets = np.eye(4)[labels] * (1 - smoothing) + smoothing / 4

    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    softmax = Supervised(settings(label_smoothing=smoothing), None, 4).loss(lambda x: x, *batch)
    assert softmax.item() == pytest.approx(-(targets * log_softmax).sum(1).mean(), rel=1e-5)

    def log_sigmoid(x):
        return -np.log1p(np.exp(-x))

    nll = -(targets * log_sigmoid(logits) + (1 - targets) * log_sigmoid(-logits)).sum(1).mean()
    sigmoid = Supervised(settings(loss="sigmoid", label_smoothing=smoothing), None, 4).loss(lambda x: x, *batch)
    assert sigmoid.item() == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_shares_of_classes_give_shares_of_their_losses(loss, smoothing):
    """Both losses are linear in the targets, so a mixed label's is the mix of both labels' losses."""
    logits, rng = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)), np.random.default_rng(0)
    objective = Supervised(settings(loss=loss, label_smoothing=smoothing), None, 4)
    whole = [objective.loss(lambda x: x, logits, torch.tensor([k])).item() for k in range(4)]
    for keep in rng.random(5):
        for a, b in ((0, 3), (2, 2)):
            shares = torch.zeros(1, 4)
            shares[0, a] += keep
            shares[0, b] += 1 - keep
            mixed = objective.loss(lambda x: x, logits, shares).item()
            assert mixed == pytest.approx(keep * whole[a] + (1 - keep) * whole[b], rel=1e-5)
