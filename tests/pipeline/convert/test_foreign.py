"""Files with timm's and torchvision's names: what is told by shapes, and what is asked for or refused.

That their logits are those of the libraries themselves is in tests/peers/test_convert.py.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.convert.recognise import open_source
from pipeline.convert.tensors import of_npz, of_torch
from shards.errors import UserError
from tests.pipeline.convert.made import TINY, randomized

VIT = {"name": "vit_ti16", **TINY}


def state(**model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in randomized(**model).state_dict().items()}


@pytest.mark.parametrize(
    "model",
    [
        {"name": "vit_s16", "image_size": 32, "num_classes": 7, "depth": 2},
        {"name": "r26_vit_s32", "image_size": 64, "num_classes": 7, "depth": 1},
        {"name": "r_vit_ti16", "image_size": 64, "num_classes": 7, "depth": 1},
        {"name": "vit_ti16", "image_size": 32, "num_classes": 0, "depth": 1, "pooling": "mean"},
        {"name": "vit_ti16", "image_size": 32, "num_classes": 5, "depth": 1, "representation": True},
    ],
)
def test_the_model_is_told_by_names_and_shapes(model, tmp_path):
    save_file(state(**model), tmp_path / "w.safetensors")
    assert open_source(tmp_path / "w.safetensors").model == model | {"gelu": "exact"}  # timm's
    found = open_source(tmp_path / "w.safetensors", given={"gelu": "tanh"})
    assert found.model == model
    wrapped = {f"module._orig_mod.{name}": value for name, value in state(**model).items()}
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    again = open_source(tmp_path / "wrapped.safetensors", given={"gelu": "tanh"})
    assert all(again.tensor(name).equal(found.tensor(name)) for name in found.parameters())


def test_a_config_of_timms_tells_more(tmp_path):
    save_file(state(**VIT), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 3, "act_layer": "gelu_tanh"}}'
    )
    model = {"name": "vit_ti8", **TINY}
    del model["patch_size"], model["num_heads"]  # the name's own
    assert open_source(tmp_path).model == open_source(tmp_path / "model.safetensors").model == model


def test_a_bit_says_nothing_of_its_images(tmp_path):
    model = {"name": "bit_r50x1", "units": [1, 2], "width": 32, "num_classes": 7, "image_size": 48}
    save_file(state(**model), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not tell the size of its images; say it with --set image_size=N"):
        open_source(tmp_path)
    assert open_source(tmp_path, given={"image_size": 48}).model == model
    (tmp_path / "config.json").write_text(
        '{"architecture": "resnetv2_50x1_bit", "pretrained_cfg": {"input_size": [3, 48, 48]}}'
    )
    assert open_source(tmp_path).model == model


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"fc_norm.weight": (48,)}, r"has fc_norm\.weight: a norm after the mean of the patches"),
        ({"norm_pre.weight": (48,)}, "a norm before the first block"),
        ({"blocks.0.ls1.gamma": (48,)}, "layer scale"),
        ({"blocks.0.attn.q_norm.weight": (16,)}, "norms of queries and keys"),
        ({"dist_token": (1, 1, 48)}, "a distillation token"),
        (
            {"blocks.0.new.weight": (3,)},
            r"1 tensors that no model here has a place for, such as blocks\.0\.new\.weight",
        ),
    ],
)
def test_parts_that_no_model_here_has_are_named(extra, what, tmp_path):
    tensors = state(**VIT) | {name: torch.zeros(shape) for name, shape in extra.items()}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=what):
        open_source(tmp_path / "w.safetensors", given={"num_heads": 3})


def test_of_other_architectures_with_such_names_the_error_is_one_line(tmp_path):
    swiglu = {name.replace("mlp.fc1", "mlp.fc1_g"): value for name, value in state(**VIT).items()}
    linear = state(**VIT) | {"patch_embed.proj.weight": torch.zeros(48, 192)}
    for tensors in (swiglu, linear):
        save_file(tensors, tmp_path / "w.safetensors")
        with pytest.raises(
            UserError, match=r"w\.safetensors is laid out otherwise than its names make believe"
        ) as error:
            open_source(tmp_path / "w.safetensors", given={"num_heads": 3})
        assert "\n" not in str(error.value)
    save_file(state(**VIT), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        '{"architecture": "vit", "model_args": {"num_heads": 3, "global_pool": "avg"}}'
    )
    with pytest.raises(UserError, match="has a class token and pools by 'avg'"):
        open_source(tmp_path)


def test_what_is_missing_or_damaged_is_one_line(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ({"weight_map": {"a": "gone.safetensors"}}, r"has no gone\.safetensors, which .*index\.json names; get all of"),
        ([], "is laid out otherwise than its names make believe"),
        ({"weight_map": 3}, "is laid out otherwise than its names make believe"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            open_source(tmp_path)
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    content = bytearray((tmp_path / "w.npz").read_bytes())
    content[content.index(np.ones(1).tobytes())] ^= 1
    (tmp_path / "w.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a of .*w\.npz cannot be read \(Bad CRC"):
        of_npz(tmp_path / "w.npz").read("a")
    with pytest.raises(UserError, match=r"a of .*w\.npz cannot be read|no known format"):
        open_source(tmp_path / "w.npz")


def test_what_is_told_wrongly_is_one_line(tmp_path):
    save_file(state(**VIT), tmp_path / "w.safetensors")
    for given, message in (
        ({}, "how many attention heads a width of 48 has; say it with --set num_heads=N"),
        ({"num_heads": 3, "units": [3]}, "unknown setting of vit_.*: 'units'"),
        ({"num_heads": 3, "mlp_dim": 50}, r"has blocks\.0\.mlp\.fc1\.weight of shape .* and not \[50, 48\]"),
        ({"num_heads": 3, "patch_size": 16}, r"has pos_embed of shape \[1, 17, 48\], and not \[1, 5, 48\]"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "w.safetensors", given=given).build()


def to_torchvision(name: str) -> str:
    """Return torchvision's name of one of ours."""
    if name.startswith("blocks."):
        _, i, rest = name.split(".", 2)
        for ours, theirs in (
            ("norm1", "ln_1"), ("norm2", "ln_2"), ("attn.qkv.", "self_attention.in_proj_"),
            ("attn.proj", "self_attention.out_proj"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"),
        ):  # fmt: skip
            rest = rest.replace(ours, theirs)
        return f"encoder.layers.encoder_layer_{i}.{rest}"
    whole = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    begins = {"patch_embed.proj": "conv_proj", "norm": "encoder.ln", "pre_logits.fc": "heads.pre_logits"}
    begins |= {"head": "heads.head"}
    return whole.get(name) or next(name.replace(a, b, 1) for a, b in begins.items() if name.startswith(a))


@pytest.mark.parametrize("old", [False, True])
def test_torchvisions_names(old, tmp_path):
    model = {"name": "vit_ti16", **TINY, "representation": True, "mlp_dim": 40}
    ours = randomized(**model)
    theirs = {to_torchvision(name): value for name, value in ours.state_dict().items()}
    assert "encoder.layers.encoder_layer_2.mlp.3.weight" in theirs
    if old:
        theirs = {
            name.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): value
            for name, value in theirs.items()
        }
    torch.save(theirs, tmp_path / "vit.pth")
    found = open_source(tmp_path / "vit.pth", given={"num_heads": 3})
    assert found.template().gelu == "exact"
    assert found.template().image_size == 32
    for name, value in ours.state_dict().items():
        assert found.tensor(name).equal(value), name


def test_resnets_of_torchvision_are_not_bits(tmp_path):
    names = ["conv1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.running_mean", "fc.weight"]
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "resnet50.pth")
    with pytest.raises(UserError, match="is a ResNet of torchvision, which has BatchNorm; the ResNets here are BiT's"):
        open_source(tmp_path / "resnet50.pth")


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_but_tensors_is_unpickled(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = {"name": "vit_s16", "image_size": 32, "num_classes": 7, "depth": 1}
    table = {"state_dict": state(**model), "args": argparse.Namespace(lr=0.1)}
    torch.save(table, tmp_path / "fine.pth", _use_new_zipfile_serialization=zipped)
    assert open_source(tmp_path / "fine.pth").model == model | {"gelu": "exact"}
    torch.save(table | {"evil": _Evil()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds more than tensors, and nothing else is unpickled") as error:
        open_source(tmp_path / "evil.pth")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="has no moving average of the weights"):
        open_source(tmp_path / "fine.pth", ema=True)


def test_files_without_a_tensor_are_refused_at_once(tmp_path):
    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="has tensors such as none, which no known format has"):
        open_source(tmp_path / "x.safetensors")


def test_tensors_of_few_values_that_seem_many_are_refused(tmp_path):
    torch.save({"cls_token": torch.zeros(1).expand(1, 1, 2**40)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="holds cls_token as no plain tensor"):
        open_source(tmp_path / "x.pth")


def test_masks_that_say_one_value_often_are_no_weights(tmp_path):
    mask = torch.ones(1, dtype=torch.bool).expand(4, 4)
    torch.save(state(**VIT) | {"mask": mask}, tmp_path / "x.pth")
    assert of_torch([tmp_path / "x.pth"], tmp_path).shapes.keys() == state(**VIT).keys()
