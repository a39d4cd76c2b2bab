import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings, check
from pipeline.objectives.supervised import supervised_loss


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
    softmax = supervised_loss(settings(label_smoothing=smoothing), 4)(lambda x: x, batch)
    assert softmax.item() == pytest.approx(-(targets * log_softmax).sum(1).mean(), rel=1e-5)

    def log_sigmoid(x):
        return -np.log1p(np.exp(-x))

    nll = -(targets * log_sigmoid(logits) + (1 - targets) * log_sigmoid(-logits)).sum(1).mean()
    sigmoid = supervised_loss(settings(loss="sigmoid", label_smoothing=smoothing), 4)(lambda x: x, batch)
    assert sigmoid.item() == pytest.approx(nll, rel=1e-5)
