"""torchvision's names of Vision Transformers; its ResNets are not BiT's.

Source: pytorch/vision, torchvision/models/vision_transformer.py. Their epsilon is 1e-6 and their GELU is exact.
"""

import re
from typing import Any

from pipeline.convert.places import at, depth_of, heads_of, read, side_of
from pipeline.convert.source import Source, named
from pipeline.convert.tensors import Tensors
from pipeline.models.vit import VisionTransformer
from shards.errors import UserError

NAMES = {
    r"cls_token": "class_token",
    r"pos_embed": "encoder.pos_embedding",
    r"patch_embed\.proj\.": "conv_proj.",
    r"blocks\.(\d+)\.norm1\.": r"encoder.layers.encoder_layer_\1.ln_1.",
    r"blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.encoder_layer_\1.self_attention.in_proj_",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.encoder_layer_\1.self_attention.out_proj.",
    r"blocks\.(\d+)\.norm2\.": r"encoder.layers.encoder_layer_\1.ln_2.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layers.encoder_layer_\1.mlp.0.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layers.encoder_layer_\1.mlp.3.",
    r"norm\.": "encoder.ln.",
    r"pre_logits\.fc\.": "heads.pre_logits.",
    r"head\.": "heads.head.",
}
OLD = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}  # before torchvision 0.14


def knows(names: set[str]) -> bool:
    """Tell whether these are torchvision's names of a Vision Transformer, or of what it calls a ResNet."""
    return "encoder.pos_embedding" in names or {"layer1.0.conv1.weight", "fc.weight"} <= names


def source(tensors: Tensors, config: dict[str, Any], given: dict[str, Any]) -> Source:
    """Return the model of a file with torchvision's names."""
    shapes = tensors.shapes
    if "encoder.pos_embedding" not in shapes:
        raise UserError(
            f"{tensors.where} is a ResNet of torchvision, which has BatchNorm; the ResNets here are BiT's, with "
            "GroupNorm and standardised filters"
        )
    if "conv_proj.weight" not in shapes:
        raise UserError(f"{tensors.where} has several convolutions before its patches; no model here has that")
    width, _, patch, _ = shapes["conv_proj.weight"]
    layer = "encoder.layers.encoder_layer_"
    old = f"{layer}0.mlp.linear_1.weight" in shapes
    grid = side_of(tensors, "encoder.pos_embedding", shapes["encoder.pos_embedding"][1] - 1)
    found = {
        "embed_dim": width,
        "patch_size": patch,
        "depth": depth_of(shapes, layer),
        "num_heads": heads_of(tensors, width, given),
        "mlp_dim": shapes[f"{layer}0.mlp.{'linear_1' if old else '0'}.weight"][0],
        "image_size": grid * patch,
        "gelu": "exact",
        "representation": "heads.pre_logits.weight" in shapes,
        "num_classes": shapes["heads.head.weight"][0] if "heads.head.weight" in shapes else 0,
    }
    made = Source("torchvision", named(VisionTransformer, found | given), tensors.read)

    def theirs(name: str) -> str:
        pattern, to = next((pattern, to) for pattern, to in NAMES.items() if re.match(pattern, name))
        name = re.sub(f"^{pattern}", to, name)
        for new, before in OLD.items():
            name = name.replace(new, before) if old else name
        return name

    return read(tensors, made, {name: at(theirs(name)) for name in made.parameters()})
