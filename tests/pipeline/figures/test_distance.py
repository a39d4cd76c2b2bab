import numpy as np
import pytest
import torch

from pipeline.figures.distance import attention_distances, draw, mean_attention_distance
from pipeline.models import create_model


@pytest.mark.parametrize(("grid", "span", "expected"), [(14, 16, 116.4922), (7, 32, 115.5029), (16, 14, 116.5651)])
@pytest.mark.parametrize("others", [0, 1, 5])
def test_uniform_attention_has_the_golden_distance(grid, span, expected, others):
    tokens = others + grid**2
    weights = torch.full((1, 2, tokens, tokens), 1 / tokens)
    found = mean_attention_distance(weights, grid, span, min(others, 1) if others < 5 else 1)
    assert found[0].tolist() == pytest.approx([expected] * 2, abs=1e-4)


def test_who_looks_at_itself_looks_nowhere_else():
    found = mean_attention_distance(torch.eye(10).expand(2, 3, 10, 10), 3, 16, 1)
    assert found.shape == (2, 3)
    assert (found == 0).all()


def test_who_looks_at_a_neighbour_looks_a_patch_far():
    weights = torch.zeros(1, 1, 4, 4)  # of a grid of 2 x 2, everybody at the one below or above
    for query, key in enumerate((2, 3, 0, 1)):
        weights[0, 0, query, key] = 1
    assert mean_attention_distance(weights, 2, 8, 0).item() == pytest.approx(8)


def test_of_a_model_as_counted_by_hand():
    model = create_model("vit_ti8", image_size=24, embed_dim=24, num_heads=3, depth=2, registers=1, seed=1).eval()
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    found = attention_distances(model, images)
    assert found.shape == (2, 3)

    # The first block, from the weights themselves.
    with torch.no_grad():
        x = torch.cat(
            [model.cls_token.expand(6, -1, -1), model.patch_embed(images), model.reg_token.expand(6, -1, -1)], 1
        )
        x = x + model.positions.table(model.pos_embed)
        qkv = model.blocks[0].attn.qkv(model.blocks[0].norm1(x)).double().numpy().reshape(6, 11, 3, 3, 8)
    expected = np.zeros(3)
    for image in range(6):
        for head in range(3):
            q, k = qkv[image, :, 0, head], qkv[image, :, 1, head]
            weights = np.exp(q @ k.T / np.sqrt(8))[1:10, 1:10]
            weights = weights / weights.sum(1, keepdims=True)
            for one in range(9):
                for other in range(9):
                    apart = 8 * np.hypot(one // 3 - other // 3, one % 3 - other % 3)
                    expected[head] += weights[one, other] * apart / 9 / 6
    assert found[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("grid", "span", "expected"), [(14, 16, 116.4922), (7, 32, 115.5029), (16, 14, 116.5651)])
def test_the_line_is_that_of_uniform_attention_and_every_head_has_its_dot(grid, span, expected):
    distances = np.random.default_rng(0).uniform(0, 100, (5, 3))
    (axis,) = draw(distances, grid, span, 128).axes
    *heads, line = axis.lines
    assert line.get_ydata() == pytest.approx([expected] * 2, abs=1e-4)
    assert all(tick == round(tick) for tick in axis.get_xticks())
    assert [list(head.get_xdata()) for head in heads] == [[1, 2, 3, 4, 5]] * 3
    assert pytest.approx(distances) == np.array([head.get_ydata() for head in heads]).T
