"""What frozen features are worth: least squares from features to classes, in closed form.

Source: section 4.1 of "An Image is Worth 16x16 Words" (regularised least squares to {-1, 1}^K), with the
details of its authors' big_vision, ``evaluators/fewshot_lsr.py``. Everything is float64 on the CPU.

Legend of the shape comments: n samples, D features, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import UserError

L2 = 1024.0
BIAS = 100.0  # the constant feature: so large that the penalty hardly touches its weight
STD_FLOOR = 1e-5
L2_GRID = (1e1, 1e2, 1e3, 1e4, 1e5, 1e6)


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

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of samples, features [n, D] and int labels [n], that it gets right."""
        scores = _standardised(_finite(features), self.mean, self.std) @ self.weights  # [n, K]
        return float((scores.argmax(1) == np.asarray(labels)).mean())


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
    features = _finite(features)
    mean, std = features.mean(0), features.std(0) + STD_FLOOR
    targets = 2.0 * np.eye(num_classes)[np.asarray(labels)] - 1.0  # [n, K]
    return LinearClassifier(mean, std, ridge(_standardised(features, mean, std), targets, l2))


def ridge(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
    """Return the w [D, K] that minimises |x w - y|^2 + l2 |w|^2, for float64 x [n, D] and y [n, K].

    Solves the smaller of the two equal systems: D x D if n >= D, else n x n.
    """
    n, d = x.shape
    if n >= d:
        return np.linalg.solve(x.T @ x + l2 * np.eye(d), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + l2 * np.eye(n), y)


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
        classifier = fit(np.asarray(train_features)[chosen], np.asarray(train_labels)[chosen], num_classes, l2)
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
    random; of equal ones the larger. The test samples have no part in the choice.

    Args:
        train_features: float [n, D].
        train_labels: int [n].
        test_features: float [m, D].
        test_labels: int [m].
        l2_grid: penalties to try, as in ``fit``.
        seed: of the held-out fifth.
    """
    train_features, train_labels = np.asarray(train_features), np.asarray(train_labels)
    num_classes = _num_classes(train_labels, test_labels)
    order = np.random.default_rng(seed).permutation(len(train_labels))
    held_out, kept = np.split(order, [len(order) // 5])

    def held_out_accuracy(l2: float) -> float:
        classifier = fit(train_features[kept], train_labels[kept], num_classes, l2)
        return classifier.accuracy(train_features[held_out], train_labels[held_out])

    l2 = max(sorted(l2_grid, reverse=True), key=held_out_accuracy)
    return fit(train_features, train_labels, num_classes, l2).accuracy(test_features, test_labels), l2


def _standardised(features: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return np.pad((features - mean) / std, ((0, 0), (0, 1)), constant_values=BIAS)  # [n, D + 1]


def _finite(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if bad := int((~np.isfinite(features)).any(1).sum()):
        raise UserError(f"features of {bad} of {len(features)} images are not finite; has the training diverged?")
    return features


def _num_classes(train_labels: np.ndarray, test_labels: np.ndarray) -> int:
    return int(max(np.max(train_labels), np.max(test_labels))) + 1
