import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.objectives.supervised import Supervised
from pipeline.settings import check
from shards.batch import Batch
from shards.manylabels import stacked


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


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_several_labels_of_an_image_are_targets_by_their_weights(loss):
    found = [((2,), ()), ((0, 3), ()), ((1, 2, 3), (0.5, 1.0, 0.5)), ((), ())][: 4 if loss == "sigmoid" else 3]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(found), 4))
    losses = []
    for row, (labels, weights) in zip(logits, found, strict=True):
        target = np.zeros(4)
        target[list(labels)] = weights or 1.0
        if loss == "softmax":
            losses.append(-(target / target.sum() * (row - np.log(np.exp(row).sum()))).sum())
        else:
            losses.append((target * np.log1p(np.exp(-row)) + (1 - target) * np.log1p(np.exp(row))).sum())
    images = rng.integers(0, 256, (len(found), 2, 2, 3), dtype=np.uint8)
    objective = Supervised(settings(loss=loss, global_batch=len(found)), None, 4)
    batch = Batch(images, stacked(found, "any"), np.arange(len(found)))
    _, targets = objective.prepare(batch)
    told = objective.loss(lambda x: torch.from_numpy(logits), None, targets).item()
    assert told == pytest.approx(np.mean(losses), rel=1e-5)

    one_each = Batch(images[:2], stacked([((3,), ()), ((1,), (1.0,))], "any"), np.arange(2))
    assert objective.prepare(one_each)[1].tolist() == [3, 1]


def test_an_image_without_labels_adds_nothing_to_a_softmax_loss():
    batch = Batch(np.zeros((2, 2, 2, 3), np.uint8), stacked([((1,), ()), ((), ())], "any"), np.arange(2))
    _, targets = Supervised(settings(global_batch=2), None, 4).prepare(batch)
    assert targets.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
