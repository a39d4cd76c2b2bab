"""The card that goes with a converted model: what it is, what made it, how it is opened elsewhere."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.models.resnet import ResNet
from pipeline.models.vit import VisionTransformer

PROVEN = "Written, read again and compared on"


def is_card(path: Path) -> bool:
    """Tell whether a conversion wrote a file."""
    return PROVEN in path.read_text(encoding="utf-8", errors="replace")


def card(note: dict[str, Any], made: nn.Module, to: str, destination: Path) -> str:
    """Return a card in Markdown.

    Args:
        note: What was noted in the files: model, classes, proof, and what is known of the training.
        made: The model, on any device.
        to: The format.
        destination: What was written.
    """
    model, proof = note["model"], note["proof"]
    parameters = sum(parameter.numel() for parameter in made.parameters())
    settings = note.get("settings")
    parts = [
        f"# {destination.stem if to != 'transformers' else destination.name}",
        f"{_what(made)} of {parameters:,} parameters, for images of {made.image_size} × {made.image_size} pixels whose "
        "values lie in [-1, 1] (`x / 127.5 - 1` of bytes), RGB"
        + (f"; {made.num_classes:,} classes." if made.num_classes else "; without a head: it gives features."),
        "## Model",
        _table(model),
        "## Training",
        _training(note, settings) if settings else f"Not known here: it was converted from {note['from']}.",
        "## Conversion",
        *([_changes(note["changed"])] if note["changed"] else []),
        f"From {note['from']} to {to}, in {proof['dtype']}. {PROVEN} {proof['images']} "
        f"images of fixed random pixels, in float32: the logits, up to {proof['largest_logits']:.4g} large, differ by "
        f"{proof['largest_difference_of_logits']:.3g} at most; what the head sees, up to "
        f"{proof['largest_features']:.4g}, by {proof['largest_difference_of_features']:.3g}.",
        "## Opening it",
        _opening(made, to, destination.name),
    ]
    if settings:
        parts += [
            "## Recipe",
            "Every setting of the last stage of training:",
            f"```json\n{json.dumps(settings, indent=1)}\n```",
        ]
    return "\n\n".join(parts) + "\n"


def _what(made: nn.Module) -> str:
    if isinstance(made, ResNet):
        return "A BiT ResNet"
    return "A hybrid of ResNet and Vision Transformer" if made.backbone is not None else "A Vision Transformer"


def _training(note: dict[str, Any], settings: dict[str, Any]) -> str:
    known = {
        "kind": settings.get("kind"),
        "data": _sources(settings.get("data", {}).get("train")),
        "validation data": settings.get("data", {}).get("val"),
        "started from": settings.get("init"),
        "samples seen": note["samples"],
        "global batch": settings.get("global_batch"),
        "weights": "moving average" if note["ema"] else "of the last step",
        "commit of Patchmill": note["commit"],
        **{f"validation {key}": value for key, value in (note["val"] or {}).items()},
    }
    return _table({key: value for key, value in known.items() if value is not None})


def _sources(train: str | list[dict[str, Any]] | None) -> str | None:
    """Return where training data came from: of several sets each with what was set of it."""
    if not isinstance(train, list):
        return train
    of_each = (", ".join(f"{k} {v}" for k, v in each.items() if k != "url" and v is not None) for each in train)
    return "; ".join(each["url"] + (f" ({said})" if said else "") for each, said in zip(train, of_each, strict=True))


def _changes(changed: dict[str, str]) -> str:
    listed = "; ".join(f"{key}, {value}" for key, value in changed.items())
    return f"Changed since the training: {listed}. What was measured in training was before that."


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _opening(made: nn.Module, to: str, name: str) -> str:
    if to == "transformers":
        kind = "ViTForImageClassification" if made.num_classes else "ViTModel"
        pooler = "" if made.num_classes or made.representation else ", add_pooling_layer=False"
        return f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("{name}"{pooler})\n```'
    if to == "npz":
        code = (
            "big_transfer"
            if isinstance(made, ResNet)
            else "big_vision"
            if made.pooling == "map"
            else "vision_transformer"
        )
        return f"With the official code, google-research/{code}, and with timm, which reads its files."
    lines = ["With Patchmill, `pipeline.convert.recognise.load_model`; any stage's `init`, `patchmill evaluate` and "
             "`fewshot` take the file."]  # fmt: skip
    if type(made) is VisionTransformer and (settings := timm_settings(made)):
        lines.append(
            "With timm, whose names these are:\n\n```python\nimport timm\nfrom safetensors.torch import load_file\n\n"
            f"model = timm.models.vision_transformer.VisionTransformer({settings})\n"
            f'model.load_state_dict(load_file("{name}"))\n```'
        )
    return "\n\n".join(lines)


def timm_settings(made: VisionTransformer) -> str | None:
    """Return the arguments of timm's VisionTransformer that make it the same model; None where it has no such."""
    if made.backbone is not None or made.representation or made.position_at != "stem" or made.registers:
        return None
    if made.position not in ("learned", "none") or made.patch_target is not None or made.norm_eps != 1e-6:
        return None
    pooling = {"cls": "token", "mean": "avg", "map": "map"}[made.pooling]
    settings = {
        "img_size": made.image_size,
        "patch_size": made.patch_size,
        "embed_dim": made.embed_dim,
        "depth": made.depth,
        "num_heads": made.num_heads,
        "mlp_ratio": made.mlp_dim / made.embed_dim,
        "qkv_bias": made.qkv_bias,
        "num_classes": made.num_classes,
        "act_layer": {"tanh": "gelu_tanh", "exact": "gelu"}[made.gelu],
    }
    if made.pooling != "cls":
        settings |= {"global_pool": pooling, "class_token": False, "fc_norm": False}
    settings |= {"pos_embed": "none"} if made.position == "none" else {}
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())
