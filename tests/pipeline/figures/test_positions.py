import numpy as np
import pytest
import torch

from pipeline.figures.positions import mosaic, position_similarity, position_table
from pipeline.models import create_model

TINY = {"name": "vit_ti8", "image_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2}


def test_similarity_is_the_cosine():
    table = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    found = position_similarity(table).numpy()
    rows = table.double().numpy()
    for one in range(9):
        for other in range(9):
            cosine = rows[one] @ rows[other] / np.linalg.norm(rows[one]) / np.linalg.norm(rows[other])
            assert found[one, other] == pytest.approx(cosine, abs=1e-12)


@pytest.mark.parametrize("grid", [2, 7])
def test_the_tile_of_a_patch_lies_where_the_patch_does(grid):
    similarity = position_similarity(torch.randn(grid**2, 6, generator=torch.Generator().manual_seed(1)))
    found = mosaic(similarity, grid)
    for row in range(grid):
        for column in range(grid):
            top, left = row * (grid + 1), column * (grid + 1)
            tile = found[top : top + grid, left : left + grid]
            assert (tile.ravel() == similarity[row * grid + column].numpy()).all()
            assert tile[row, column] == pytest.approx(1)  # a patch is most like itself
    assert np.isnan(found).sum() == found.size - grid**4


def test_the_class_token_and_registers_have_no_tile():
    model = create_model(**TINY, registers=2, seed=0)
    table = position_table(model)
    assert table.shape == (16, 24)
    assert torch.equal(table, model.pos_embed[0, 1:17])


@pytest.mark.parametrize("position", ["learned", "learned_2d", "sincos_2d", "sincos_2d_moco"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_table_is_what_the_model_adds_to_its_patches(position, pooling):
    model = create_model(**TINY, position=position, pooling=pooling, seed=0).eval()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        model(images)
        added = seen[0][0, -16:] - model.patch_embed(images)[0]
    assert torch.allclose(added, position_table(model), atol=1e-6)


@pytest.mark.parametrize("settings", [{"position": "none"}, {"position": "relative", "position_at": "every"}])
def test_nothing_that_is_added_has_no_figure(settings):
    assert position_table(create_model(**TINY, **settings, seed=0)) is None
