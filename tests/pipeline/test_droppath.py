import numpy as np

from pipeline.droppath import drop_path_draws


def test_a_sample_draws_by_its_seed_epoch_and_position_alone():
    positions = np.arange(24, 48)
    whole = drop_path_draws(positions, 31, 5, 3)
    assert whole.shape == (24, 3, 2)
    assert whole.dtype == np.float32
    for world_size in (2, 3, 8):
        for rank in range(world_size):
            assert np.array_equal(drop_path_draws(positions[rank::world_size], 31, 5, 3), whole[rank::world_size])
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(drop_path_draws(positions, 31, 6, 3), whole).any()
    assert np.array_equal(drop_path_draws(positions, 31, 5, 4)[:, :3], whole)  # a deeper model draws more, no others
    forever = drop_path_draws(positions, None, 5, 3)
    assert np.array_equal(forever[:7], whole[:7])
    assert not np.isin(forever[7:], whole[7:]).any()  # from 31 on, it is another epoch there


def test_draws_are_uniform():
    draws = drop_path_draws(np.arange(4000), 1000, 0, 12)
    assert 0 <= draws.min() < 1e-3
    assert 0.999 < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 3e-3
    for share in (0.1, 0.5):
        assert np.abs((draws < share).mean(0) - share).max() < 0.03


def test_without_stochastic_depth_nothing_is_drawn():
    assert drop_path_draws(np.arange(5), 31, 0, 0).shape == (5, 0, 2)
