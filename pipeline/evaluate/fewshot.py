"""What frozen features are worth: least squares from features to classes, in closed form.

Source: section 4.1 of "An Image is Worth 16x16 Words" (regularised least squares to {-1, 1}^K), with the
details of its authors' big_vision, ``evaluators/fewshot_lsr.py``. Everything is float64 on the CPU, some samples at a
time, so features may be in a file that is larger than memory.

Legend of the shape comments: n samples, D features, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import UserError

L2 = 1024.0
BIAS = 100.0  # the constant feature: so large that the penalty hardly touches its weight
STD_FLOOR = 1e-5
L2_GRID = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
AT_ONCE = 4096  # samples that are float64 at a time,
AT_ONCE_BYTES = 2**26  # or fewer, if they take more than this


@dataclass(frozen=True)
class LinearClassifier:
    """A linear classifier of standardised features.

    Attributes:
        mean: [D], of the samples it was fitted to.
        std: [D], likewise, the population's, raised by 1e-5.
        weights: [D + 1, K]; the last row belongs to the constant feature.
    """

    mean: np.ndarray
    std: np.ndarray
    weights: np.ndarray

    def accuracy(self, features: np.ndarray, labels: np.ndarray, rows: np.ndarray | None = None) -> float:
        """Return the share of samples, features [n, D] and int labels [n], that it gets right; of ``rows`` alone."""
        labels, right, count = np.asarray(labels), 0, 0
        for part, x in _parts(features, rows):
            scores = _standardised(x, self.mean, self.std) @ self.weights  # [part, K]
            right, count = right + int((scores.argmax(1) == labels[part]).sum()), count + len(part)
        return right / count


def fit(features: np.ndarray, labels: np.ndarray, num_classes: int, l2: float = L2) -> LinearClassifier:
    """Fit by regularised least squares to the targets +1 for a sample's class, -1 for the others.

    Args:
        features: float [n, D]; standardised here, by their own statistics.
        labels: int [n] in 0 ... num_classes - 1.
        num_classes: K.
        l2: weight of the penalty, in units of summed squares of standardised features.

    Raises:
        UserError: a feature is not finite.
    """
    return next(fits(features, labels, num_classes, (l2,)))


def fits(
    features: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    penalties: Sequence[float],
    rows: np.ndarray | None = None,
) -> Iterator[LinearClassifier]:
    """Fit once with each of several penalties, as ``fit`` does, one after the other; to the samples at ``rows`` alone.

    Solves the smaller of two equal systems: (D + 1) x (D + 1), summed up part by part, or n x n.
    """
    labels, n, d = np.asarray(labels), len(features if rows is None else rows), features.shape[1] + 1
    mean = sum(x.sum(0) for _, x in _parts(features, rows)) / n
    std = np.sqrt(sum(np.square(x - mean).sum(0) for _, x in _parts(features, rows)) / n) + STD_FLOOR
    parts = ((labels[part], _standardised(x, mean, std)) for part, x in _parts(features, rows))
    if n < d:
        x, chosen, filled = np.empty((n, d)), labels if rows is None else labels[rows], 0
        for _, part in parts:
            x[filled : filled + len(part)] = part
            filled += len(part)
        gram, targets = x @ x.T, 2.0 * np.eye(num_classes)[chosen] - 1.0
    else:
        gram, sums = np.zeros((d, d)), np.zeros((num_classes, d))
        for chosen, part in parts:
            gram += part.T @ part
            order = np.argsort(chosen, kind="stable")
            classes, starts = np.unique(chosen[order], return_index=True)
            sums[classes] += np.add.reduceat(part[order], starts)
        targets = (2.0 * sums - sums.sum(0)).T  # x.T @ targets, without x and targets: [D + 1, K]
    diagonal = gram.diagonal().copy()
    for l2 in penalties:
        np.fill_diagonal(gram, diagonal + l2)
        solution = np.linalg.solve(gram, targets)
        yield LinearClassifier(mean, std, x.T @ solution if n < d else solution)


def fewshot_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    shots: int,
    seeds: Sequence[int] = (0, 1, 2),
    l2: float = L2,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Return the test accuracy of fits to ``shots`` samples a class, one fit a seed.

    Args:
        train_features: float [n, D], of which the samples are drawn.
        train_labels: int [n].
        test_features: float [m, D].
        test_labels: int [m].
        shots: samples a class.
        seeds: each draws its own samples.
        l2: penalty, as in ``fit``.
        class_names: names of the labels 0 ... K - 1, for the error message.

    Returns:
        float64 [len(seeds)], each in 0 ... 1.

    Raises:
        UserError: a class has fewer training samples than ``shots``.
    """
    num_classes = _num_classes(train_labels, test_labels)
    check_shots(train_labels, num_classes, shots, class_names)
    accuracies = []
    for seed in seeds:
        chosen = draw_shots(train_labels, num_classes, shots, seed)
        classifier = next(fits(train_features, train_labels, num_classes, (l2,), chosen))
        accuracies.append(classifier.accuracy(test_features, test_labels))
    return np.array(accuracies)


def check_shots(labels: np.ndarray, num_classes: int, shots: int, class_names: Sequence[str] | None = None) -> None:
    """Raise a UserError where a class of int labels [n] has fewer samples than ``shots``."""
    for c, members in enumerate(np.bincount(labels, minlength=num_classes)):
        if members < shots:
            name = class_names[c] if class_names else c
            raise UserError(f"class {name} has {members} training images for {shots} shots; ask for fewer")


def draw_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Return the places of ``shots`` samples of each class, int64 [num_classes * shots], class by class."""
    rng = np.random.default_rng(seed)
    by_class = (np.flatnonzero(np.asarray(labels) == c) for c in range(num_classes))
    return np.concatenate([rng.permutation(members)[:shots] for members in by_class])


def least_squares_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    l2_grid: Sequence[float] = L2_GRID,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the test accuracy of a fit to all training samples, and the l2 that it used.

    The l2 is the one of ``l2_grid`` with the best accuracy on a fifth of the training samples, held out at
    random; of equal ones the larger. Of fewer than five samples none is, and ``L2`` is used. The test samples have no
    part in the choice.

    Args:
        train_features: float [n, D].
        train_labels: int [n].
        test_features: float [m, D].
        test_labels: int [m].
        l2_grid: penalties to try, as in ``fit``.
        seed: of the held-out fifth.
    """
    num_classes = _num_classes(train_labels, test_labels)
    order = np.random.default_rng(seed).permutation(len(train_labels))
    held_out, kept = (np.sort(part) for part in np.split(order, [len(order) // 5]))
    l2, penalties = L2, sorted(l2_grid, reverse=True)
    if len(held_out):
        tried = fits(train_features, train_labels, num_classes, penalties, kept)
        scores = [classifier.accuracy(train_features, train_labels, held_out) for classifier in tried]
        l2 = penalties[int(np.argmax(scores))]
    return fit(train_features, train_labels, num_classes, l2).accuracy(test_features, test_labels), l2


def _standardised(features: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)  # [n, D + 1]


def _parts(features: np.ndarray, rows: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places and float64 features of some samples after another; a UserError if any is not finite."""
    rows, bad = np.arange(len(features)) if rows is None else rows, 0
    at_once = max(1, min(AT_ONCE, AT_ONCE_BYTES // (8 * features.shape[1])))
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        x = np.asarray(features[part], dtype=np.float64)
        bad += int((~np.isfinite(x)).any(1).sum())
        if not bad:
            yield part, x
    if bad:
        raise UserError(f"features of {bad} of {len(rows)} images are not finite; has the training diverged?")


def _num_classes(train_labels: np.ndarray, test_labels: np.ndarray) -> int:
    return int(max(np.max(train_labels), np.max(test_labels))) + 1
