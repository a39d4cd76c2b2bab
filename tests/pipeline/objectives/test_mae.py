import re

import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.flops import cost_of
from pipeline.masking import visible_count, visible_patches
from pipeline.models import create_model
from pipeline.objectives.mae import MaskedAutoencoding, pixel_targets
from pipeline.settings import check
from pipeline.weights import check_model, resolve_model
from shards.batch import Batch
from shards.errors import UserError
from tests.pipeline.objectives.reference_mae import mae_loss, patch_pixels, reconstruction

SIDE, GRID = 32, 4
SMALL = {"decoder_depth": 2, "decoder_dim": 16, "decoder_heads": 2}
MODEL = {"name": "vit_ti8", "embed_dim": 24, "depth": 2, "num_heads": 3, "position": "sincos_2d_moco", "gelu": "exact"}


def settings(**over) -> TrainSettings:
    base = {
        "kind": "mae", "duration": "1 step", "global_batch": 4, "data": {"train": "x", "resolution": SIDE},
        "model": MODEL, "mae": SMALL,
    }  # fmt: skip
    return check(TrainSettings, base | over, "test")


def model_of(settings: TrainSettings):
    """Return a model whose every value is away from zero."""
    model = create_model(**resolve_model(settings, None, 7))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) / 10)
    return model.eval()


def transformers_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our parameters to those of transformers 5 in memory."""
    words = {
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection", "cls_token": "vit.embeddings.cls_token",
        "norm": "vit.layernorm", "decoder.embed": "decoder.decoder_embed", "decoder.norm": "decoder.decoder_norm",
        "decoder.pred": "decoder.decoder_pred", "norm1": "layernorm_before", "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    renamed = {}
    for name, value in state.items():
        path, _, kind = name.rpartition(".")
        found = re.fullmatch(r"(decoder\.)?blocks\.(\d+)\.(.*)", path)
        layer = found and f"{'decoder.decoder_layers' if found[1] else 'vit.layers'}.{found[2]}"
        if found and found[3] == "attn.qkv":
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.attention.{letter}_proj.{kind}"] = part
        elif found:
            renamed[f"{layer}.{words[found[3]]}.{kind}"] = value
        else:
            renamed[words.get(name, name) if name.endswith("token") else f"{words[path]}.{kind}"] = value
    return renamed


@pytest.fixture(scope="module")
def batch():
    images = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    return Batch(images, np.zeros(3, dtype=np.int64), np.arange(3) * 7)


def test_a_quarter_of_the_patches_is_seen_each_as_often_as_any_other():
    seen = visible_patches(np.arange(20_000), 1_000_000, 0, 16, 0.75)
    assert seen.shape == (20_000, 4)
    assert (np.diff(seen, axis=1) > 0).all()
    counts = np.bincount(seen.flatten(), minlength=16)
    assert np.abs(counts - 5000).max() < 6 * np.sqrt(5000)
    pairs = np.bincount((seen[:, :1] * 16 + seen[:, 1:2]).flatten(), minlength=256)
    assert (pairs > 0).sum() == 13 * 14 // 2  # the first two of four, in every way
    assert visible_count(196, 0.75) == 49
    assert visible_count(256, 0.75) == 64
    assert (visible_count(196, 0.999), visible_count(196, 0.001), visible_count(4, 0.9)) == (1, 195, 1)


def test_masks_depend_on_seed_epoch_and_position_alone():
    first = visible_patches(np.arange(40), 1000, 0, 196, 0.75)
    assert (visible_patches(np.array([7, 3, 39]), 1000, 0, 196, 0.75) == first[[7, 3, 39]]).all()
    assert (visible_patches(np.arange(40), 1000, 1, 196, 0.75) != first).any(axis=1).all()
    assert (visible_patches(np.arange(40) + 20, 20, 0, 196, 0.75) != first).any(axis=1).all()
    assert (visible_patches(np.arange(40), None, 0, 196, 0.75) == first).all()


@pytest.mark.parametrize("norm", [True, False])
def test_reconstruction_and_loss_are_those_of_the_numpy_reference(batch, norm):
    chosen = settings(mae={**SMALL, "norm_pixels": norm})
    model = model_of(chosen)
    objective = MaskedAutoencoding(chosen, model, epoch=1000)
    images, visible = objective.prepare(batch)
    assert visible.shape == (3, 4)
    parameters = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    with torch.no_grad():
        told = model(images, visible=visible)
        loss = objective.loss(model, images, visible).item()
    pixels = batch.images.transpose(0, 3, 1, 2) / 127.5 - 1
    expected = [
        reconstruction(parameters, image, seen, 3, 2) for image, seen in zip(pixels, visible.tolist(), strict=True)
    ]
    assert np.abs(told.numpy() - np.stack(expected)).max() < 1e-5
    losses = [mae_loss(*each, norm) for each in zip(expected, pixels, visible.tolist(), strict=True)]
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert (
        np.abs(pixel_targets(images, GRID, False).numpy() - [patch_pixels(each, GRID) for each in pixels]).max() < 1e-6
    )


def test_masked_patches_are_not_seen_and_visible_ones_are_not_told(batch):
    chosen = settings(mae={**SMALL, "norm_pixels": False})
    model = model_of(chosen)
    objective = MaskedAutoencoding(chosen, model, epoch=1000)
    images, visible = objective.prepare(batch)
    seen = torch.zeros(3, GRID**2).scatter(1, visible, 1.0).view(3, 1, GRID, GRID)
    seen = seen.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    with torch.no_grad():
        assert model(images, visible=visible).equal(model(images * seen + 0.3 * (1 - seen), visible=visible))
        told = model(images, visible=visible)
        wrong = told.scatter(1, visible[:, :, None].expand(-1, -1, told.shape[2]), 1e6)
        assert objective.loss(lambda *_, **__: wrong, images, visible) == objective.loss(model, images, visible)


def test_it_is_transformers_masked_autoencoder(batch):
    transformers = pytest.importorskip("transformers")
    chosen = settings()
    model = model_of(chosen)
    config = transformers.ViTMAEConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=SIDE, patch_size=8,
        layer_norm_eps=1e-6, decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=2,
        decoder_intermediate_size=64, mask_ratio=0.75, norm_pix_loss=True, hidden_act="gelu",
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    fixed = {  # of which transformers has nothing but room; the reference has them by the equations
        "vit.embeddings.position_embeddings": model.pos_embed, "decoder.decoder_pos_embed": model.decoder.pos_embed,
    }  # fmt: skip
    theirs.load_state_dict(transformers_state(model.state_dict()) | fixed)
    images, visible = MaskedAutoencoding(chosen, model, epoch=1000).prepare(batch)
    noise = torch.ones(3, GRID**2).scatter(1, visible, torch.zeros(visible.shape))
    with torch.no_grad():
        found = theirs(images, noise=noise)
        assert torch.allclose(model(images, visible=visible), found.logits, atol=1e-5)
        assert MaskedAutoencoding(chosen, model, 1000).loss(model, images, visible).item() == pytest.approx(
            found.loss.item(), rel=1e-5
        )


def test_what_it_costs_is_the_encoder_on_what_it_sees_and_the_decoder_on_all():
    def blocks(tokens, width, depth):
        return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)

    found = cost_of("vit_b16", num_classes=0, decoder_depth=8, hidden=0.75)
    embed, decoder = 196 * 768 * 768, blocks(197, 512, 8) + 50 * 768 * 512 + 196 * 512 * 768
    assert found.macs == embed + blocks(50, 768, 12) + decoder
    with_head = cost_of("vit_b16", num_classes=0).parameters
    assert found.parameters - with_head == 8 * (12 * 512**2 + 13 * 512) + 2 * 512 + 2 * 512 * 768 + 512 + 768 + 512


def test_what_does_not_go_together_is_told():
    with pytest.raises(UserError, match=r"loss, label_smoothing and mixup are of classes, and kind 'mae' has none"):
        settings(data={"train": "x", "augment": "light2"})
    with pytest.raises(UserError, match=r"setting mae\.share = 1\.0 in test does not fit"):
        settings(mae={"share": 1.0})
    for name in ("bit_r50x1", "axial_vit_b16"):
        stage = settings(model={"name": name}, data={"train": "x", "resolution": 224})
        with pytest.raises(UserError, match=f"masked autoencoding wants a decoder of patches, and '{name}' has none"):
            check_model(stage, "test")
    for over, words in (
        ({"decoder_heads": 3}, "decoder_dim 512 is not divisible by decoder_heads 3; take 2 or 4"),
        ({"decoder_dim": 0}, "decoder_dim is too small: 0"),
        ({"decoder_dim": 6, "decoder_heads": 2}, "width 6 does not suit"),
        ({"pooling": "map"}, "masked autoencoding does not go with pooling 'map'"),
        ({"position": "relative", "position_at": "shared"}, "does not go with position 'relative'"),
        ({"position_at": "every"}, "does not go with position_at 'every'"),
    ):
        with pytest.raises(UserError, match=words):
            create_model("vit_ti8", **{"decoder_depth": 1} | over)
    with pytest.raises(UserError, match=r"does not go with backbone \[3, 4, 9\]"):
        create_model("r50_vit_b16", decoder_depth=1)
