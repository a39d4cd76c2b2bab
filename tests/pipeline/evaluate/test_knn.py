import numpy as np
import pytest
import torch

from pipeline.evaluate import knn
from pipeline.evaluate.knn import knn_accuracy


def by_hand(train, train_labels, test, test_labels, k):
    right = 0
    for query, truth in zip(test.astype(np.float64), test_labels, strict=True):
        cosines = train.astype(np.float64) @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        votes = {}
        for place in np.argsort(-cosines)[:k]:
            votes[train_labels[place]] = votes.get(train_labels[place], 0) + np.exp(cosines[place] / 0.07)
        right += max(votes, key=votes.get) == truth
    return right / len(test)


@pytest.mark.parametrize("k", [1, 20, 500])
def test_the_vote_is_that_of_all_neighbours_in_parts_too(monkeypatch, k):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 12))
    labels = rng.integers(0, 5, 260)
    features = (centres[labels] + 1.4 * rng.normal(size=(260, 12))).astype(np.float32)
    data = features[:200], labels[:200], features[200:], labels[200:]
    expected = by_hand(*data, k)
    assert 0.2 < expected < 0.95
    assert knn_accuracy(*data, k, torch.device("cpu")) == expected
    monkeypatch.setattr(knn, "TRAIN_AT_ONCE", 7)
    monkeypatch.setattr(knn, "TEST_AT_ONCE", 11)
    assert knn_accuracy(*data, k, torch.device("cpu")) == expected
