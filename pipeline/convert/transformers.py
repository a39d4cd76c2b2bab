"""transformers' folders of ViTs: config.json, weights and a preprocessor.

Source: huggingface/transformers, models/vit. Files of 4.x and of 5.x have the same names; 5.x has others in memory, and
some save those. What is written are the names of files, which every version reads.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.convert import safetensors
from pipeline.convert.places import Places, at, heads_of, read
from pipeline.convert.places import write as write_places
from pipeline.convert.source import Source, named
from pipeline.convert.tensors import EXPORT, Tensors
from pipeline.models.vit import VisionTransformer
from shards.errors import UserError

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
FILES = (CONFIG, WEIGHTS, PREPROCESSOR, "README.md")
NAMES = {
    r"cls_token": ("embeddings.cls_token",) * 2,
    r"pos_embed": ("embeddings.position_embeddings",) * 2,
    r"patch_embed\.proj\.": ("embeddings.patch_embeddings.projection.",) * 2,
    r"blocks\.(\d+)\.norm1\.": (r"encoder.layer.\1.layernorm_before.", r"layers.\1.layernorm_before."),
    r"blocks\.(\d+)\.attn\.proj\.": (r"encoder.layer.\1.attention.output.dense.", r"layers.\1.attention.o_proj."),
    r"blocks\.(\d+)\.norm2\.": (r"encoder.layer.\1.layernorm_after.", r"layers.\1.layernorm_after."),
    r"blocks\.(\d+)\.mlp\.fc1\.": (r"encoder.layer.\1.intermediate.dense.", r"layers.\1.mlp.fc1."),
    r"blocks\.(\d+)\.mlp\.fc2\.": (r"encoder.layer.\1.output.dense.", r"layers.\1.mlp.fc2."),
    r"norm\.": ("layernorm.",) * 2,
    r"pre_logits\.fc\.": ("pooler.dense.",) * 2,
}
"""Our names -> theirs in files, and those that 5.x has in memory."""
QKV = (
    ("encoder.layer.{}.attention.attention.{}.", ("query", "key", "value")),
    ("layers.{}.attention.{}.", ("q_proj", "k_proj", "v_proj")),
)
ACTIVATIONS = {"gelu": "exact", "gelu_python": "exact", "gelu_pytorch_tanh": "tanh", "gelu_new": "tanh"}
NO_PART = ("embeddings.mask_token", "decoder.")  # of masked image modelling: of no use once it is over
POOLER = "pooler."  # their classifier does not ask it


def knows(names: set[str]) -> bool:
    """Tell whether these are transformers' names of a ViT."""
    return any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in names)


def source(tensors: Tensors, config: dict[str, Any], given: dict[str, Any]) -> Source:
    """Return the model of a folder; ``config`` is its config.json."""
    kind = config.get("model_type", "vit")
    if kind != "vit":
        raise UserError(
            f"{tensors.where} is a model of type {kind!r} of transformers; of its models only 'vit' is taken"
        )
    shapes = tensors.shapes
    prefix = "vit." if "vit.embeddings.cls_token" in shapes else ""
    style = int(f"{prefix}layers.0.layernorm_before.weight" in shapes)
    found = _settings(tensors, config, prefix, given) | given
    labels = config.get("id2label") or {}
    classes = [labels[key] for key in sorted(labels, key=int)]
    known = len(classes) == found["num_classes"] and not all(re.fullmatch(r"LABEL_\d+", each) for each in classes)
    made = Source("transformers", named(VisionTransformer, found), tensors.read, classes if known else [])
    no_part = NO_PART if found["representation"] else (*NO_PART, POOLER)
    left = [name for name in shapes if name.removeprefix(prefix).startswith(no_part) or name.startswith(no_part)]
    return read(tensors, made, _places(made, prefix, style), left)


def _settings(tensors: Tensors, config: dict[str, Any], prefix: str, given: dict[str, Any]) -> dict[str, Any]:
    shapes = tensors.shapes
    activation = config.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{tensors.where} has the activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    pooled = f"{prefix}pooler.dense.weight" in shapes and "classifier.weight" not in shapes  # which is asked without it
    if config.get("pooler_act", "tanh") != "tanh" and pooled:
        raise UserError(f"{tensors.where} has {config['pooler_act']!r} in its pooler; only tanh is known")
    width, channels, patch, _ = shapes[f"{prefix}embeddings.patch_embeddings.projection.weight"]
    if channels != 3:
        raise UserError(f"{tensors.where} is of images with {channels} channels; only 3 are taken")
    size = config.get("image_size", round((shapes[f"{prefix}embeddings.position_embeddings"][1] - 1) ** 0.5) * patch)
    layers = [name for name in shapes if re.search(r"layernorm_before\.weight$", name)]
    wide = next(shape[0] for name, shape in shapes.items() if re.search(r"intermediate\.dense\.w|mlp\.fc1\.w", name))
    return {
        "embed_dim": width,
        "num_heads": config.get("num_attention_heads") or heads_of(tensors, width, given),
        "patch_size": patch,
        "depth": len(layers),
        "mlp_dim": wide,
        "image_size": size[0] if isinstance(size, list) else size,
        "gelu": ACTIVATIONS[activation],
        "norm_eps": config.get("layer_norm_eps", 1e-12),
        "qkv_bias": any(name.endswith(("attention.query.bias", "q_proj.bias")) for name in shapes),
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "representation": pooled,
        "num_classes": shapes["classifier.weight"][0] if "classifier.weight" in shapes else 0,
    }


def _places(source: Source, prefix: str, style: int = 0) -> Places:
    places: Places = {}
    for name in source.parameters():
        if name.startswith("head."):
            places[name] = at(name.replace("head.", "classifier."))
        elif found := re.match(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name):
            pattern, parts = QKV[style]
            places[name] = at(*(f"{prefix}{pattern.format(found[1], part)}{found[2]}" for part in parts))
        else:
            pattern, to = next((pattern, to) for pattern, to in NAMES.items() if re.match(pattern, name))
            places[name] = at(prefix + re.sub(f"^{pattern}", to[style], name))
    return places


def refusal(made: nn.Module) -> str | None:
    """Return what transformers' ViT lacks of a model, and what to do; None where it can say all of it."""
    if type(made) is not VisionTransformer:
        return f"a {type(made).__name__}: of transformers' models its ViT alone is written"
    return next((what for lacks, what in (
        (made.backbone is not None, "a hybrid: there is no ResNet before the patches"),
        (made.pooling != "cls", f"pooling {made.pooling!r}: the class token alone goes to the head"),
        (made.registers > 0, "registers"),
        (made.position == "relative" or made.position_at != "stem", "positions inside the blocks"),
        (made.patch_target is not None, "a head on every patch; take it off with --classes 0"),
        (made.representation and made.num_classes > 0, "a tanh layer before the head (pre_logits); take the head off "
         "with --classes 0 and that layer is its pooler, or take both for a new head with --classes N"),
    ) if lacks), None)  # fmt: skip


def write(folder: Path, source: Source, cast: Callable[[Tensor], Tensor], note: dict[str, Any]) -> None:
    """Write the files of a folder: weights, config.json, preprocessor_config.json."""
    made = source.template()
    assert isinstance(made, VisionTransformer)  # of others ``refusal`` says something
    like, tensor = write_places(source, _places(source, "vit." if made.num_classes else ""))
    like = {name: cast(value) for name, value in like.items()}
    metadata = {"format": "pt", EXPORT: json.dumps(note)}
    safetensors.write(folder / WEIGHTS, like, lambda name: cast(tensor(name)), metadata, safetensors.ROOM)
    names = source.classes or [f"LABEL_{i}" for i in range(made.num_classes)]
    dtype = str(next(iter(like.values())).dtype).removeprefix("torch.")
    config = {
        "architectures": ["ViTForImageClassification" if made.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": made.embed_dim,
        "num_hidden_layers": made.depth,
        "num_attention_heads": made.num_heads,
        "intermediate_size": made.mlp_dim,
        "hidden_act": {"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[made.gelu],
        "layer_norm_eps": made.norm_eps,
        "hidden_dropout_prob": made.dropout.p,
        "attention_probs_dropout_prob": 0.0,
        "image_size": made.image_size,
        "patch_size": made.patch_size,
        "num_channels": 3,
        "qkv_bias": made.qkv_bias,
        "torch_dtype": dtype,  # what 5.x calls dtype, and reads under this name too
    }
    if made.num_classes:
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    size = {"height": made.image_size, "width": made.image_size}
    preprocessor = {"image_processor_type": "ViTImageProcessor", "do_resize": True, "size": size, "resample": 2}
    preprocessor |= {"do_rescale": True, "rescale_factor": 1 / 255}
    preprocessor |= {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # to [-1, 1]
    for name, content in ((CONFIG, config), (PREPROCESSOR, preprocessor)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Tell whether a folder was written here."""
    with suppress(SafetensorError, OSError), safe_open(folder / WEIGHTS, framework="pt") as file:
        return EXPORT in (file.metadata() or {})
    return False


def change_note(folder: Path, note: dict[str, Any]) -> None:
    """Put another note into a written folder."""
    safetensors.change_metadata(folder / WEIGHTS, {"format": "pt", EXPORT: json.dumps(note)})
