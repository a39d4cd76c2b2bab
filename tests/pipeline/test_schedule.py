import numpy as np
import pytest

from pipeline.schedule import learning_rate


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_follows_the_official_formula(shape):
    base, end, warmup, total = 1e-3, 1e-5, 1_000, 9_000
    seen = np.arange(100, total + 1, 100)
    done = np.clip((seen - warmup) / (total - warmup), 0, 1)
    decay = 1 - done if shape == "linear" else 0.5 * (1 + np.cos(np.pi * done))
    expected = (end + (base - end) * decay) * np.minimum(1, seen / warmup)
    ours = [learning_rate(int(s), shape=shape, base=base, end=end, warmup=warmup, total=total) for s in seen]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert ours[-1] == pytest.approx(end)
    assert max(ours) == pytest.approx(base)


def test_without_warm_up_it_starts_at_the_peak():
    rate = learning_rate(1, shape="cosine", base=0.1, end=0.0, warmup=0, total=10**9)
    assert rate == pytest.approx(0.1)
