"""Few-shot least squares against independent solutions."""

import tracemalloc

import numpy as np
import pytest

from pipeline.evaluate import fewshot
from pipeline.evaluate.fewshot import fewshot_accuracy, fit, least_squares_accuracy
from shards.errors import UserError


def clusters(n: int, d: int, num_classes: int, noise: float, seed: int = 0):
    """Return features [n, d] (float32) in noisy clusters, one a class, and labels [n]."""
    centres = np.random.default_rng(99).normal(size=(num_classes, d)) * 3 + 5
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % num_classes)
    return (centres[labels] + noise * rng.normal(size=(n, d))).astype(np.float32), labels


def expected_weights(features, labels, num_classes, l2):
    """The stacked problem [x; sqrt(l2) I] w = [y; 0] by lstsq: no normal equations."""
    x = features.astype(np.float64)
    x = (x - x.mean(0)) / (np.sqrt(((x - x.mean(0)) ** 2).mean(0)) + 1e-5)
    x = np.concatenate([x, np.full((len(x), 1), 100.0)], axis=1)
    y = np.where(labels[:, None] == np.arange(num_classes), 1.0, -1.0)
    stacked = np.concatenate([x, np.sqrt(l2) * np.eye(x.shape[1])])
    return np.linalg.lstsq(stacked, np.concatenate([y, np.zeros((x.shape[1], num_classes))]), rcond=None)[0]


@pytest.mark.parametrize("n", [12, 20, 21, 22, 200])  # with the constant feature D is 21: both sides of the fork
@pytest.mark.parametrize("l2", [1.0, 1024.0])
def test_fit_equals_lstsq(n, l2):
    features, labels = clusters(n, 20, 4, noise=2.0)
    classifier = fit(features, labels, 4, l2)
    np.testing.assert_allclose(classifier.weights, expected_weights(features, labels, 4, l2), rtol=0, atol=1e-6)


def test_both_branches_agree():
    """A feature that is always zero changes no other weight, and moves the same problem to the other branch."""
    features, labels = clusters(21, 20, 4, noise=2.0)
    wider = np.pad(features, ((0, 0), (0, 1)))
    expected = np.insert(fit(features, labels, 4, 7.0).weights, 20, 0.0, axis=0)
    np.testing.assert_allclose(fit(wider, labels, 4, 7.0).weights, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("d", [6, 90])  # fewer and more than there are samples
def test_part_by_part_and_of_some_rows_it_is_the_same(monkeypatch, tmp_path, d):
    features, labels = clusters(120, d, 3, noise=2.0)
    rows = np.random.default_rng(1).permutation(120)[:80]
    whole = [fit(features[rows], labels[rows], 3, l2) for l2 in (1.0, 1024.0)]
    monkeypatch.setattr(fewshot, "AT_ONCE", 7)
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    parts = fewshot.fits(mapped, labels, 3, (1.0, 1024.0), rows)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one.weights, other.weights, rtol=0, atol=1e-9)
        assert one.accuracy(features[rows], labels[rows]) == other.accuracy(mapped, labels, rows)


@pytest.mark.long
def test_a_million_images_need_no_more_memory_than_their_labels(tmp_path):
    """Of what NumPy has at a time; the file of features is mapped, and of 128 MB as float64."""
    n, d = 1_000_000, 16
    features = np.lib.format.open_memmap(tmp_path / "features.npy", "w+", np.float32, (n, d))
    labels = np.random.default_rng(0).integers(0, 10, n)
    for start in range(0, n, 100_000):
        part = slice(start, start + 100_000)
        features[part] = np.random.default_rng(start).standard_normal((100_000, d), np.float32)
        features[part, 0] += labels[part]
    tracemalloc.start()
    try:
        few = fewshot_accuracy(features, labels, features, labels, 25)
        every, _ = least_squares_accuracy(features, labels, features, labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * labels.nbytes  # places of rows, halves of them, and parts of 4,096
    assert min(few.mean(), every) > 0.15


def test_fewshot_draws_per_class_in_class_order():
    features, labels = clusters(120, 6, 3, noise=4.0)
    test_features, test_labels = clusters(90, 6, 3, noise=4.0, seed=1)
    expected = []
    for seed in (0, 1, 2):
        rng = np.random.default_rng(seed)
        chosen = np.concatenate([rng.permutation(np.where(labels == c)[0])[:5] for c in range(3)])
        picked = features[chosen].astype(np.float64)
        weights = expected_weights(features[chosen], labels[chosen], 3, 1024.0)
        x = (test_features - picked.mean(0)) / (picked.std(0) + 1e-5)
        scores = x @ weights[:-1] + 100.0 * weights[-1]
        expected.append((scores.argmax(1) == test_labels).mean())
    got = fewshot_accuracy(features, labels, test_features, test_labels, shots=5)
    np.testing.assert_array_equal(got, expected)
    assert 0.4 < got.mean() < 1


def test_fewshot_needs_enough_images_of_every_class():
    features, labels = clusters(40, 4, 4, noise=1.0)
    keep = (labels != 2) | (np.cumsum(labels == 2) <= 3)
    arguments = (features[keep], labels[keep], features, labels)
    assert len(fewshot_accuracy(*arguments, shots=3)) == 3
    with pytest.raises(UserError, match="class 2 has 3 training images for 5 shots"):
        fewshot_accuracy(*arguments, shots=5)
    with pytest.raises(UserError, match="class flags has 3 training images"):
        fewshot_accuracy(*arguments, shots=5, class_names=["a", "b", "flags", "d"])
    with pytest.raises(UserError, match="class 3 has 0 training images"):
        fewshot_accuracy(features[labels < 3], labels[labels < 3], features, labels, shots=1)


def test_least_squares_chooses_its_penalty_on_held_out_training_samples():
    """More features than samples, much noise, and test labels that are not asked."""
    features, labels = clusters(100, 150, 5, noise=12.0)
    test_features, test_labels = clusters(500, 150, 5, noise=12.0, seed=1)
    accuracy, l2 = least_squares_accuracy(features, labels, test_features, test_labels)
    assert accuracy == fit(features, labels, 5, l2).accuracy(test_features, test_labels)
    assert accuracy > 0.5
    shuffled = np.random.default_rng(3).permutation(test_labels)
    wrong, same_l2 = least_squares_accuracy(features, labels, test_features, shuffled)
    assert same_l2 == l2
    assert wrong < 0.35

    held_out, kept = np.split(np.random.default_rng(0).permutation(100), [20])
    scores = {}
    for penalty in (1e1, 1e3, 1e5):
        classifier = fit(features[kept], labels[kept], 5, penalty)
        scores[penalty] = classifier.accuracy(features[held_out], labels[held_out])
    _, chosen = least_squares_accuracy(features, labels, test_features, test_labels, l2_grid=tuple(scores))
    assert scores[chosen] == max(scores.values())


def test_a_constant_feature_does_no_harm():
    features, labels = clusters(60, 5, 3, noise=1.0)
    constant = np.pad(features, ((0, 0), (0, 1)), constant_values=0.1)
    test = np.pad(features, ((0, 0), (0, 1)), constant_values=0.9)
    assert fit(constant, labels, 3).accuracy(test, labels) == fit(features, labels, 3).accuracy(features, labels)


def test_features_that_are_not_finite():
    features, labels = clusters(30, 4, 3, noise=1.0)
    broken = features.copy()
    broken[[4, 9], 1] = np.nan
    with pytest.raises(UserError, match="2 of 30 images are not finite"):
        fit(broken, labels, 3)
    with pytest.raises(UserError, match="2 of 30 images are not finite"):
        fit(features, labels, 3).accuracy(broken, labels)


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_few_training_images_are_fitted_and_of_less_than_five_none_is_held_out(n):
    features, labels = clusters(n, 6, 2, noise=0.1)
    accuracy, l2 = least_squares_accuracy(features, labels, features, labels)
    assert accuracy == fit(features, labels, labels.max() + 1, l2).accuracy(features, labels)
    assert l2 == fewshot.L2 if n < 5 else l2 in fewshot.L2_GRID


@pytest.mark.long
def test_wide_features_need_little_more_memory_than_they_have_as_float64():
    """As raw pixels are: the weights of 6 penalties would take six times as much."""
    n, d, classes = 250, 60_000, 250
    features, labels = np.random.default_rng(0).standard_normal((n, d), np.float32), np.arange(n) % classes
    tracemalloc.start()
    try:
        least_squares_accuracy(features, labels, features, labels)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    weights = 8 * d * classes
    assert peak < 8 * n * d + 2 * weights + 3 * fewshot.AT_ONCE_BYTES
