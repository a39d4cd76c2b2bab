"""timm's names, which are ours; files of timm say little of their model, so its shapes do.

Source: pytorch-image-models, timm/models/vision_transformer.py, vision_transformer_hybrid.py and resnetv2.py.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from pipeline.convert.places import Places, at, depth_of, heads_of, read, side_of
from pipeline.convert.source import Source, ask, named
from pipeline.convert.tensors import Tensors
from pipeline.models.hybrid import downsampling
from pipeline.models.resnet import ResNet
from pipeline.models.vit import VisionTransformer
from shards.errors import UserError

GELU = {"gelu_tanh": "tanh", "gelu": "exact", "quick_gelu": None}


def knows(names: set[str]) -> bool:
    """Tell whether these are timm's names of a model that we have too."""
    return "patch_embed.proj.weight" in names or {"stem.conv.weight", "norm.weight"} <= names


def source(tensors: Tensors, config: dict[str, Any], given: dict[str, Any]) -> Source:
    """Return the model of a file with timm's names; ``config`` is the config.json beside it."""
    if "stem.conv.weight" in tensors.shapes:
        return _resnet(tensors, config, given)
    return _vit(tensors, config, given)


def _vit(tensors: Tensors, config: dict[str, Any], given: dict[str, Any]) -> Source:
    shapes, made_with = tensors.shapes, config.get("model_args") or {}
    for name, why in (
        ("fc_norm.weight", "a norm after the mean of the patches, which comes before it here"),
        ("norm_pre.weight", "a norm before the first block"),
        ("blocks.0.ls1.gamma", "layer scale"),
        ("blocks.0.attn.q_norm.weight", "norms of queries and keys"),
        ("dist_token", "a distillation token"),
    ):
        if name in shapes:
            raise UserError(f"{tensors.where} has {name}: {why}, and no model here has that")
    width, channels, patch, _ = shapes["patch_embed.proj.weight"]
    found: dict[str, Any] = {"embed_dim": width, "patch_size": patch, "depth": depth_of(shapes, "blocks.")}
    found["mlp_dim"] = shapes["blocks.0.mlp.fc1.weight"][0]
    found["qkv_bias"] = "blocks.0.attn.qkv.bias" in shapes
    found["num_heads"] = made_with.get("num_heads") or heads_of(tensors, width, given)
    found["gelu"] = GELU.get(made_with.get("act_layer", "gelu"))
    if found["gelu"] is None:
        raise UserError(f"{tensors.where} was made with {made_with['act_layer']!r}; only gelu and gelu_tanh are known")
    span = patch
    if any(name.startswith("patch_embed.backbone.") for name in shapes):
        stages = "patch_embed.backbone.stages."
        units = [depth_of(shapes, f"{stages}{stage}.blocks.") for stage in range(depth_of(shapes, stages))]
        root = "patch_embed.backbone.stem.conv.weight" if units else "patch_embed.backbone.conv.weight"
        found |= {"backbone": units, "backbone_width": shapes[root][0]}
        span = patch * downsampling(units)
    elif channels != 3:
        raise UserError(f"{tensors.where} is of images with {channels} channels; only 3 are taken")
    if "cls_token" in shapes and made_with.get("global_pool", "token") != "token":
        raise UserError(
            f"{tensors.where} has a class token and pools by {made_with['global_pool']!r}; here it is the token then"
        )
    cls, registers = int("cls_token" in shapes), shapes.get("reg_token", (1, 0))[1]
    found |= {"pooling": "cls" if cls else "map" if "attn_pool.latent" in shapes else "mean", "registers": registers}
    found["representation"] = "pre_logits.fc.weight" in shapes
    found["num_classes"] = shapes["head.weight"][0] if "head.weight" in shapes else 0
    found |= _size(config)
    elsewhere: Places = {}
    if "pos_embed" not in shapes:
        found["position"] = "none"
    else:
        patches = shapes["pos_embed"][1] - cls - registers
        every = round(patches**0.5) ** 2 == patches  # or patches alone have positions (no_embed_class)
        grid = side_of(tensors, "pos_embed", patches if every else shapes["pos_embed"][1])
        found["image_size"] = grid * span
        if every and registers:  # added once for all, where here they are none
            first = cls + registers
            elsewhere["pos_embed"] = at("pos_embed", ours=lambda v: torch.cat([v[:, :cls], v[:, first:]], 1))
            elsewhere["reg_token"] = at("reg_token", ours=lambda v: v + tensors.read("pos_embed")[:, cls:first])
        elif not every and cls:
            elsewhere["pos_embed"] = at("pos_embed", ours=lambda v: F.pad(v, (0, 0, 1, 0)))
    found |= given
    if "image_size" not in found:
        raise ask(tensors.where, "the size of its images", "image_size=N")
    made = Source("timm's names", named(VisionTransformer, found), tensors.read)
    return read(tensors, made, {name: at(name) for name in made.parameters()} | elsewhere)


def _resnet(tensors: Tensors, config: dict[str, Any], given: dict[str, Any]) -> Source:
    shapes = tensors.shapes
    if "stem.norm.weight" in shapes or "stages.0.blocks.0.norm1.running_mean" in shapes:
        raise UserError(f"{tensors.where} is a ResNet of another kind than BiT's: it has a norm in its root")
    found: dict[str, Any] = {"width": shapes["stem.conv.weight"][0]}
    found["units"] = [depth_of(shapes, f"stages.{stage}.blocks.") for stage in range(depth_of(shapes, "stages."))]
    found["num_classes"] = shapes["head.fc.weight"][0] if "head.fc.weight" in shapes else 0
    found |= _size(config) | given
    if "image_size" not in found:
        raise ask(tensors.where, "the size of its images", "image_size=N")
    made = Source("timm's names", named(ResNet, found), tensors.read)
    return read(tensors, made, {name: at(name) for name in made.parameters()})


def _size(config: dict[str, Any]) -> dict[str, int]:
    size = (config.get("pretrained_cfg") or {}).get("input_size")
    return {"image_size": size[-1]} if size else {}
