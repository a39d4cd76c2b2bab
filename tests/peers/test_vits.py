"""Vision Transformers against timm's, in the peers' environment; `make test-peers` runs it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models import create_model
from tests.peers.test_resnets import ask_timm

pytestmark = pytest.mark.peers

TIMMS = {
    "vit_ti16": "vit_tiny_patch16_224",
    "vit_s8": "vit_small_patch8_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_s32": "vit_small_patch32_224",
    "vit_b8": "vit_base_patch8_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_b32": "vit_base_patch32_224",
    "vit_l14": "vit_large_patch14_224",
    "vit_l16": "vit_large_patch16_224",
    "vit_l32": "vit_large_patch32_224",
    "vit_h14": "vit_huge_patch14_224",
}


def test_names_and_shapes(tmp_path):
    theirs = json.loads(ask_timm({"names": list(TIMMS.values())}, tmp_path).splitlines()[-1])
    for ours, name in TIMMS.items():
        with torch.device("meta"):
            model = create_model(ours, seed=None, num_classes=0)
        expected = {key: shape for key, shape in theirs[name].items() if not key.startswith("head.")}
        assert {key: list(p.shape) for key, p in model.named_parameters()} == expected, ours


# Mean pooling in the official form takes the norm first and then the mean: timm's with fc_norm=False, not its default.
MEAN = {"global_pool": "avg", "class_token": False, "fc_norm": False}
MAP = {"global_pool": "map", "class_token": False}


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("vit_ti16", {"gelu": "tanh"}, {}),
        ("vit_s16", {"gelu": "exact"}, {}),
        ("vit_b16", {"gelu": "tanh"}, {}),
        ("vit_b32", {"gelu": "exact"}, {}),
        ("vit_s8", {"gelu": "tanh", "depth": 2}, {"depth": 2}),
        ("vit_s32", {"gelu": "tanh"}, {}),
        ("vit_b8", {"gelu": "tanh", "depth": 2}, {"depth": 2}),
        ("vit_l14", {"gelu": "tanh", "depth": 2}, {"depth": 2}),
        ("vit_l16", {"gelu": "tanh", "depth": 4}, {"depth": 4}),
        ("vit_l32", {"gelu": "tanh", "depth": 4}, {"depth": 4}),
        ("vit_h14", {"gelu": "tanh", "depth": 3}, {"depth": 3}),
        ("vit_ti16", {"pooling": "mean"}, MEAN),
        ("vit_ti16", {"pooling": "map"}, MAP),
        ("vit_ti16", {"pooling": "map", "registers": 4}, MAP | {"reg_tokens": 4, "no_embed_class": True}),
        ("vit_ti16", {"registers": 4}, {"reg_tokens": 4}),
        ("vit_ti16", {"qkv_bias": False}, {"qkv_bias": False}),
        ("vit_ti16", {"position": "none"}, {"pos_embed": "none"}),
        ("vit_s16", {"position": "sincos_2d", "pooling": "mean"}, MEAN),
    ],
)
def test_logits(name, ours, theirs, tmp_path):
    model = create_model(name, num_classes=10, seed=3, **ours).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # what begins at 0 or 1 should have an effect
            if parameter.dim() == 1 or key in ("cls_token", "reg_token", "head.weight"):
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
        images = torch.randn(2, 3, 224, 224, generator=generator)
        expected = model(images)
    state = model.state_dict()
    if model.position == "sincos_2d":  # for which timm has a parameter only
        state["pos_embed"] = model.pos_embed
    elif model.registers and model.pooling == "cls":  # which have positions there
        state["pos_embed"] = torch.cat(
            [state["pos_embed"][:, :1], torch.zeros(1, model.registers, model.embed_dim), state["pos_embed"][:, 1:]], 1
        )
    save_file(state | {"images": images}, tmp_path / "tensors.safetensors")
    request = {
        "name": TIMMS[name],
        "settings": {"num_classes": 10, "act_layer": {"tanh": "gelu_tanh", "exact": "gelu"}[model.gelu], **theirs},
        "tensors": str(tmp_path / "tensors.safetensors"),
        "logits": str(tmp_path / "logits.safetensors"),
    }
    ask_timm(request, tmp_path)
    assert expected.std() > 0.1
    torch.testing.assert_close(expected, load_file(tmp_path / "logits.safetensors")["logits"], rtol=0, atol=1e-5)
