import numpy as np
import pytest
import torch

from pipeline.figures.attention import watched
from pipeline.figures.rollout import Rollout, overlay, rollout
from pipeline.models import create_model

TINY = {"name": "vit_ti8", "image_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 3}


def model_of(**settings):
    return create_model(**TINY, **settings, seed=0).eval()


@pytest.mark.parametrize(
    "settings", [{}, {"pooling": "mean"}, {"registers": 2}, {"position": "relative", "position_at": "shared"}]
)
def test_rollout_is_the_product_of_all_blocks(settings):
    model, images = model_of(**settings), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    seen = []
    with watched(model, lambda block, weights: seen.append(weights.double().numpy())), torch.no_grad():
        model(images)
    assert len(seen) == 3
    first = 0 if settings.get("pooling") == "mean" else 1
    expected = []
    for image in range(2):
        product = np.eye(seen[0].shape[2])
        for weights in seen:
            mean = sum(weights[image, head] for head in range(3)) / 3 + np.eye(len(product))
            product = (mean / mean.sum(1, keepdims=True)) @ product
        row = product[0] if first else product[:16].mean(0)
        expected.append(row[first : first + 16] / row[first : first + 16].sum())
    assert rollout(model, images).flatten(1).numpy() == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("settings", [{}, {"position": "relative", "position_at": "shared"}, {"qkv_bias": False}])
def test_the_weights_are_those_that_the_model_attends_with(settings):
    """Else the values, summed by them, would not be what the layer gives."""
    model = model_of(**settings)
    found = []
    layer = model.blocks[1].attn
    layer.register_forward_hook(lambda module, inputs, output: found.append((inputs, output)))
    seen = {}
    with watched(model, seen.__setitem__), torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
        (x, *_), output = found[0]
        values = layer.qkv(x).unflatten(2, (3, 3, 8))[:, :, 2].transpose(1, 2)
        again = layer.proj((seen[1] @ values).transpose(1, 2).flatten(2))
    assert torch.allclose(seen[1].sum(3), torch.ones(()))
    assert torch.allclose(again, output, atol=1e-6)


def test_watching_changes_nothing_and_ends():
    model, images = model_of(), torch.randn(2, 3, 32, 32)
    calls = []
    with torch.no_grad():
        before = model(images)
        with watched(model, lambda *_: calls.append(None)):
            assert torch.equal(model(images), before)
        model(images)
    assert len(calls) == 3


def test_a_token_that_only_sees_one_patch_lights_that_patch():
    weights = torch.zeros(1, 2, 5, 5)
    weights[:, :, torch.arange(5), [3, 1, 2, 3, 4]] = 1  # the class token sees the third patch, all others themselves
    rolled = Rollout()
    for block in range(2):
        rolled.see(block, weights)
    assert rolled.product[0, 0].tolist() == [0.25, 0, 0, 0.75, 0]


def test_an_overlay_is_bright_where_the_weights_are():
    pixels = np.full((64, 64, 3), 200, dtype=np.uint8)
    weights = np.zeros((4, 4), dtype=np.float32)
    weights[0, 3] = 1
    lit = overlay(pixels, weights, 16)
    assert lit.shape == (64, 64, 3)
    assert lit.max() == 200
    assert lit[:16, 48:].mean() > 10 * lit[32:, :32].mean()
