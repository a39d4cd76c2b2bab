"""Linear probing: logistic regression on frozen features, whose samples stay on the ranks that have them.

Least squares of few shots is in fewshot.py. Everything is float64 and full-batch, so the result is a function of the
features alone.

Legend of the shape comments: n samples of this rank, N of all, D features, K classes.
"""

import torch
from torch import Tensor

from pipeline import distributed

CHUNK = 8192  # samples whose logits are in memory at once
ITERATIONS = 100
L2 = 1.0  # |weights|^2 / 2 beside the losses summed over all samples: what scikit-learn calls C = 1
STD_FLOOR = 1e-5


def linear_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> float:
    """Return the test accuracy of logistic regression on all training samples; collective over all ranks.

    Features are standardised by the training samples' means and deviations; the bias is not penalised. L-BFGS goes on
    until its steps no longer matter, or for a hundred of them.

    Args:
        train: [n, D], this rank's; any dtype, on any device.
        train_labels: int64 [n].
        test: [m, D], this rank's.
        test_labels: int64 [m].
        classes: K.
    """
    device = distributed.device()
    train, test = (each.to(device, torch.float64) for each in (train, test))
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    total, mean = _summed(torch.cat([train.new_tensor([len(train)]), train.sum(0)])).tensor_split([1])
    mean = mean / total
    std = (_summed((train - mean).square().sum(0)) / total).sqrt() + STD_FLOOR
    train, test = (train - mean) / std, (test - mean) / std
    weights = _fit(train, train_labels, classes)
    right = sum(
        (_logits(part, weights).argmax(1) == labels).sum()
        for part, labels in zip(test.split(CHUNK), test_labels.split(CHUNK), strict=True)
    )
    right, count = distributed.sum_over_ranks([float(right), len(test)])
    return right / count


def _fit(x: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return the weights [D + 1, K] of least summed loss over all ranks' samples, the last row the bias."""
    weights = torch.nn.Parameter(x.new_zeros(x.shape[1] + 1, classes))
    optimizer = torch.optim.LBFGS([weights], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")

    @torch.no_grad()
    def closure() -> Tensor:
        loss, gradient = x.new_zeros(1), torch.zeros_like(weights)
        for part, label in zip(x.split(CHUNK), labels.split(CHUNK), strict=True):
            shares = _logits(part, weights).log_softmax(1)  # [chunk, K]
            loss -= shares.gather(1, label[:, None]).sum()
            shares = shares.exp().scatter_add(1, label[:, None], -shares.new_ones(len(label), 1))
            gradient[:-1] += part.T @ shares
            gradient[-1] += shares.sum(0)
        loss, gradient = _summed(torch.cat([loss, gradient.flatten()])).tensor_split([1])
        weights.grad = gradient.view_as(weights)
        weights.grad[:-1] += L2 * weights[:-1]
        return loss.squeeze() + L2 / 2 * weights[:-1].square().sum()

    optimizer.step(closure)
    return weights.detach()


def _logits(x: Tensor, weights: Tensor) -> Tensor:
    return x @ weights[:-1] + weights[-1]


def _summed(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values
