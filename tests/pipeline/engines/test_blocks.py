"""A model's blocks: which they are, and that computing their activations again changes no number."""

import pytest
import torch

from pipeline.config import EngineSettings
from pipeline.engines.blocks import blocks_of, prepare_blocks
from pipeline.models import create_model
from shards.errors import UserError

VIT = {"name": "vit_ti16", "image_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
MAE = VIT | {"num_classes": 0, "decoder_depth": 2, "decoder_dim": 16, "decoder_heads": 2}


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (VIT | {"num_classes": 5}, ["blocks.0", "blocks.1", "blocks.2"]),
        (MAE, ["blocks.0", "blocks.1", "blocks.2", "decoder.blocks.0", "decoder.blocks.1"]),
    ],
)
def test_blocks_in_their_order(model, blocks):
    built = create_model(**model, seed=None)
    names = {module: name for name, module in built.named_modules()}
    assert [names[block] for block in blocks_of(built)] == blocks


@pytest.mark.parametrize(("every", "again"), [(0, 0), (1, 5), (2, 3), (4, 2)])
def test_every_kth_block_of_encoder_and_decoder_runs_again(every, again):
    model = create_model(**MAE, seed=0)
    images, visible = torch.randn(2, 3, 16, 16), torch.tensor([[0, 3, 9, 15], [1, 2, 3, 4]])
    runs = []
    for block in blocks_of(model):
        block.norm1.register_forward_hook(lambda *_: runs.append(1))

    def gradients():
        model.zero_grad()
        model(images, visible=visible).square().mean().backward()
        return {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }

    plain = gradients()
    assert len(runs) == 5
    prepare_blocks(model, EngineSettings(recompute_every=every))
    runs.clear()
    torch.testing.assert_close(gradients(), plain, rtol=0, atol=0)
    assert len(runs) == 5 + again


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"engine.recompute_every is of blocks, and Identity has none; unset it"):
        prepare_blocks(torch.nn.Identity(), EngineSettings(recompute_every=1))
