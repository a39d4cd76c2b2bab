"""Position embeddings at another resolution, against interpolation in NumPy."""

import numpy as np
import pytest
import torch

from pipeline.models.positions import Positions, interpolate_pos_embed
from shards.errors import UserError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_zoom(grid: np.ndarray, new: int) -> np.ndarray:
    """scipy.ndimage.zoom(grid, (new/g, new/g, 1), order=1): linear between the two neighbours, ends kept."""
    at = np.linspace(0, len(grid) - 1, new)
    low = np.minimum(at.astype(int), max(len(grid) - 2, 0))
    high, part = np.minimum(low + 1, len(grid) - 1), (at - low)[:, None]
    rows = grid[low] * (1 - part[..., None]) + grid[high] * part[..., None]
    return rows[:, low] * (1 - part) + rows[:, high] * part


@pytest.mark.parametrize(("old", "new"), [(6, 8), (14, 24), (8, 5), (7, 7)])
def test_interpolate_pos_embed_is_the_official_zoom(old, new):
    pos_embed = normal(1, 1 + old * old, 16, seed=old)
    stretched = interpolate_pos_embed(pos_embed, new)
    assert torch.equal(stretched[:, 0], pos_embed[:, 0])
    grid = pos_embed[0, 1:].view(old, old, 16).double().numpy()
    try:
        from scipy.ndimage import zoom

        expected = zoom(grid, (new / old, new / old, 1), order=1)
    except ImportError:
        expected = numpy_zoom(grid, new)
    np.testing.assert_allclose(stretched[0, 1:].view(new, new, 16).numpy(), expected, rtol=0, atol=1e-5)
    if old == new:
        assert torch.equal(stretched, pos_embed)


def test_interpolate_pos_embed_of_no_square():
    with pytest.raises(UserError, match="12 patches"):
        interpolate_pos_embed(torch.zeros(1, 13, 4), 4)


def test_without_a_class_token_all_of_it_is_stretched():
    grid = normal(1, 36, 8)
    stretched = Positions("learned", "stem", 8, 8, class_token=False, registers=0).resize(grid)
    with_token = interpolate_pos_embed(torch.cat([normal(1, 1, 8), grid], dim=1), 8)
    assert torch.equal(stretched, with_token[:, 1:])


@pytest.mark.parametrize(("old", "new"), [(6, 8), (7, 12), (8, 5), (1, 4), (3, 3)])
def test_columns_and_rows_are_stretched_as_the_zoom_of_what_they_make(old, new):
    before, after = (Positions("learned_2d", "stem", grid, 16, class_token=True, registers=2) for grid in (old, new))
    pos_embed = normal(*before.empty().shape)
    table = before.table(pos_embed)[0, 1:-2].view(old, old, 16).double().numpy()
    stretched = after.resize(pos_embed)
    assert stretched.shape == after.empty().shape
    found = after.table(stretched)
    np.testing.assert_allclose(found[0, 1:-2].view(new, new, 16).numpy(), numpy_zoom(table, new), rtol=0, atol=1e-5)
    assert not found[0, [0, -2, -1]].any()
    if old == new:
        assert torch.equal(stretched, pos_embed)


def test_offsets_have_no_place_on_another_grid():
    """From offset 1 of 4 x 4 patches lie (0, 1) and (1, -3): one key for what another grid tells apart."""
    keys = normal(*Positions("relative", "every", 4, 8, class_token=True, registers=0).empty().shape)
    for grid in (3, 6):
        with pytest.raises(UserError, match=f"a grid of 4 x 4 patches cannot go to {grid} x {grid}: ") as error:
            Positions("relative", "every", grid, 8, class_token=True, registers=0).resize(keys)
        assert "\n" not in str(error.value)


def test_a_dtype_is_kept():
    for kind, shape in (("learned", (1, 5, 8)), ("learned_2d", (1, 4, 4))):
        positions = Positions(kind, "shared", 3, 8, class_token=True, registers=0)
        resized = positions.resize(normal(*shape).bfloat16())
        assert resized.dtype == torch.bfloat16
        assert resized.shape == positions.empty().shape
