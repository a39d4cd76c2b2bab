import numpy as np
import pytest
from scipy import stats

from shards.errors import UserError
from shards.mixup import mixup_weights, pair_weight, partner_rows
from shards.order import rank_positions


def chance_of(weights, alpha):
    """Return how likely weights are to be so far from their law: chi-square over tenths of the law.

    P(max(b, 1 - b) <= w) = 2 P(b <= w) - 1, since Beta(alpha, alpha) is symmetric.
    """
    law = stats.beta(alpha, alpha)
    edges = np.unique(np.floor(law.ppf(np.linspace(0.55, 0.95, 9)) * 65536)) / 65536 + 2**-17  # between two weights
    edges = np.concatenate([[0.5], edges[edges < 1], [1]])
    found = np.histogram(weights, edges)[0]
    return stats.chisquare(found, np.diff(2 * law.cdf(edges) - 1) * len(weights)).pvalue


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 2.0])
def test_weights_are_of_the_greater_half_of_a_beta_distribution(alpha):
    weights = np.array([pair_weight((1, 0, p), alpha) for p in range(4000)])
    assert weights.min() >= 0.5
    assert weights.max() <= 1
    assert (weights * 65536 % 1 == 0).all()
    assert chance_of(weights, alpha) > 1e-3
    assert chance_of(weights, 1.5 * alpha) < 1e-3
    assert np.corrcoef(weights[:-1], weights[1:])[0, 1] == pytest.approx(0, abs=0.06)


def test_weights_are_pinned():
    weights = [pair_weight((0, 0, p), 0.2) for p in range(3)]
    assert weights == [0.6667633056640625, 0.9391937255859375, 0.9984588623046875]


@pytest.mark.parametrize(("start", "batch"), [(0, 48), (48, 48), (1000, 48), (7, 48), (96, 24)])
def test_partners_and_weights_are_the_same_on_any_ranks(start, batch):
    """Across an epoch's edge, too: 7 + 48 is past the 37 samples of an epoch."""
    want = None
    for world_size in (1, 2, 3, 4, 6, 12):
        found = {}
        for rank in range(world_size):
            positions = rank_positions(start, batch, rank, world_size)
            partners = positions[partner_rows(len(positions))]
            weights = mixup_weights(positions, 37, 5, 0.2)
            assert weights.dtype == np.float32
            for p, q, w in zip(positions.tolist(), partners.tolist(), weights.tolist(), strict=True):
                assert q == (p + batch // 2 if p < start + batch // 2 else p - batch // 2)
                found[p] = (q, w)
        assert sorted(found) == list(range(start, start + batch))
        assert all(found[q] == (p, w) for p, (q, w) in found.items())
        want = want or found
        assert found == want
    assert len({w for _, w in want.values()}) > batch // 4


def test_a_pair_is_keyed_by_seed_epoch_and_its_first_position():
    positions = np.arange(30, 54)
    weights = mixup_weights(positions, 37, 5, 0.2)
    assert weights.tolist() == [pair_weight((5, p // 37, p), 0.2) for p in range(30, 42)] * 2
    assert (mixup_weights(positions, 37, 6, 0.2) != weights).any()
    assert (mixup_weights(positions, 38, 5, 0.2) != weights).any()


def test_an_odd_share_is_refused():
    with pytest.raises(UserError, match="a rank has 3 samples of a global batch"):
        mixup_weights(rank_positions(0, 12, 1, 4), 37, 5, 0.2)
