"""The official .npz files of JAX: ViT, hybrid and BiT, under their old and their new names, and big_vision's.

Source: google-research/vision_transformer (checkpoint.py, models_vit.py, models_resnet.py), google-research/big_vision
(models/vit.py, models/bit_paper.py) and google-research/big_transfer. Kernels lie the other way round there, and those
of attention are cut into heads. Epsilon is 1e-6, and GELU its approximation by tanh.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.convert.places import Places, at, depth_of, read, side_of
from pipeline.convert.places import write as write_places
from pipeline.convert.source import Source, ask, named
from pipeline.convert.tensors import Tensors
from pipeline.models.hybrid import downsampling
from pipeline.models.resnet import ResNet
from pipeline.models.vit import VisionTransformer
from shards.errors import UserError

PREFIXES = ("opt/target/", "params/img/", "params/", "")  # where the parameters are in what else is kept of a run


def _turned(value: Tensor) -> Tensor:
    """Turn a dense kernel [in, out] into ours [out, in], or back."""
    return value.mT


def _filters(value: Tensor) -> Tensor:
    """Turn a convolution's kernel [h, w, in, out] into ours [out, in, h, w]."""
    return value.permute(3, 2, 0, 1)


def _kernel(value: Tensor) -> Tensor:
    return value.permute(2, 3, 1, 0)


DENSE = {"ours": _turned, "theirs": _turned}
CONV = {"ours": _filters, "theirs": _kernel}
FLAT = {"ours": torch.flatten, "theirs": lambda value: value[None, None, None]}  # [1, 1, 1, C] of old GroupNorms


def knows(names: set[str]) -> bool:
    """Tell whether these are names of an official model."""
    return any(f"{prefix}embedding/kernel" in names for prefix in PREFIXES) or bool(_root(names))


def _root(names: Iterable[str]) -> str | None:
    """Return the name of the first convolution of a BiT ResNet."""
    pattern = r"(.*/)?(root_block/standardized_conv2d(_\d+)?/kernel|root_block/conv_root/kernel)"
    return next((name for name in names if re.fullmatch(pattern, name)), None)


def source(tensors: Tensors, config: dict[str, Any], given: dict[str, Any]) -> Source:
    """Return the model of an official file."""
    known = tensors.note.get("model", {})
    if "image_size" in known:  # of what we wrote
        given = {"image_size": known["image_size"]} | given
    root = _root(tensors.shapes)
    made = _resnet(tensors, root, given) if root else _vit(tensors, given)
    classes = tensors.note.get("classes", [])
    return replace(made, classes=classes if len(classes) == made.model["num_classes"] else [])


# ---- Vision Transformers and hybrids


def _vit(tensors: Tensors, given: dict[str, Any]) -> Source:
    prefix = next(prefix for prefix in PREFIXES if f"{prefix}embedding/kernel" in tensors.shapes)
    # Beside the parameters there may be the state of an optimizer, or another tower.
    names = {name.removeprefix(prefix) for name in tensors.shapes if name.startswith(prefix)}
    shapes = {name: tensors.shapes[prefix + name] for name in names}
    scan = "Transformer/encoderblock/LayerNorm_0/scale" in shapes
    old = not scan and "Transformer/encoderblock_0/LayerNorm_2/scale" in shapes
    block = "Transformer/encoderblock/" if scan else "Transformer/encoderblock_0/"
    query = f"{block}MultiHeadDotProductAttention_{int(old)}/query/kernel"
    if query not in shapes:
        raise UserError(f"{tensors.where} has no {prefix}{query}; it is of another architecture")
    *_, width, heads, _ = shapes[query]
    patch, _, _, _ = shapes["embedding/kernel"]
    found: dict[str, Any] = {"embed_dim": width, "num_heads": heads, "patch_size": patch, "gelu": "tanh"}
    found["depth"] = shapes[query][0] if scan else depth_of(shapes, "Transformer/encoderblock_", "/")
    found["mlp_dim"] = shapes[f"{block}MlpBlock_{3 if old else 0}/Dense_0/kernel"][-1]
    span = patch
    if "conv_root/kernel" in shapes:
        units = [depth_of(shapes, f"block{b + 1}/unit", "/") - 1 for b in range(depth_of(shapes, "block", "/") - 1)]
        found |= {"backbone": units, "backbone_width": shapes["conv_root/kernel"][-1]}
        span = patch * downsampling(units)
    pool = next((pool for pool in ("MAPHead_0/", "") if f"{pool}probe" in shapes), None)
    found["pooling"] = "cls" if "cls" in shapes else "mean" if pool is None else "map"
    found["representation"] = "pre_logits/kernel" in shapes
    found["num_classes"] = shapes["head/bias"][0] if "head/bias" in shapes else 0
    tables = ("Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding", "pos_embedding")
    table = next((name for name in tables if name in shapes), None)
    first = 0
    if table is not None:
        there = shapes[table][-2]
        # big_vision's class token has no position: it is put before the patches after they got theirs.
        first = int(found["pooling"] == "cls" and round(there**0.5) ** 2 != there)
        found |= {"position": "learned", "image_size": side_of(tensors, table, there - first) * span}
    elif "position" not in given:
        raise ask(tensors.where, "what position embeddings it has", "position=sincos_2d, or position=none")
    found |= given
    if "image_size" not in found:
        raise ask(tensors.where, "the size of its images", "image_size=N")
    made = Source("official .npz", named(VisionTransformer, found), tensors.read)
    places = _places(made, old=old, scan=scan, table=table, pool=pool)
    if table is not None and found["pooling"] == "cls" and not first:
        places["pos_embed"] = at(table, ours=lambda value: F.pad(value, (0, 0, 1, 0)))
    inside = Tensors(
        tensors.where,
        shapes,
        lambda name: tensors.read(prefix + name),
        lambda name, i: tensors.row(prefix + name, i),
        tensors.note,
    )
    return read(inside, made, places)


def _places(source: Source, old: bool, scan: bool = False, table: str | None = None, pool: str | None = None) -> Places:
    """Return the places of a ViT or hybrid: ``old`` names, blocks stacked by ``scan``, ``pool`` before a MAP head's."""
    heads = source.template().num_heads
    attention, second, mlp = (1, 2, 3) if old else (0, 1, 0)
    into = {
        "weight": {"ours": lambda v: v.flatten(1).mT, "theirs": lambda v: v.mT.unflatten(1, (heads, -1))},
        "bias": {"ours": torch.flatten, "theirs": lambda v: v.unflatten(0, (heads, -1))},
    }
    out = {
        "weight": {"ours": lambda v: v.flatten(0, 1).mT, "theirs": lambda v: v.mT.unflatten(0, (heads, -1))},
        "bias": {},
    }
    kernel = {"weight": "kernel", "bias": "bias"}
    scale = {"weight": "scale", "bias": "bias"}

    def layer(name: str, to: str, row: int | None = None) -> Any:
        """Return the place of what is a layer of a block: of attention, an MLP or a norm."""
        path, _, what = name.rpartition(".")
        if path in ("attn.qkv", "kv", "q"):
            parts = {"attn.qkv": ("query", "key", "value"), "kv": ("key", "value"), "q": ("query",)}[path]
            names = (f"{to}MultiHeadDotProductAttention_{attention}/{part}/{kernel[what]}" for part in parts)
            return at(*names, **into[what], row=row)
        if path in ("attn.proj", "proj"):
            return at(f"{to}MultiHeadDotProductAttention_{attention}/out/{kernel[what]}", **out[what], row=row)
        if path.startswith("mlp.fc"):
            dense = f"{to}MlpBlock_{mlp}/Dense_{int(path[-1]) - 1}/{kernel[what]}"
            return at(dense, **(DENSE if what == "weight" else {}), row=row)
        number = second if path == "norm2" else 0
        return at(f"{to}LayerNorm_{number}/{scale[what]}", row=row)

    places: Places = {}
    for name in source.parameters():
        what = name.rpartition(".")[2]
        if found := re.match(r"blocks\.(\d+)\.(.+)", name):
            i = int(found[1])
            to = "Transformer/encoderblock/" if scan else f"Transformer/encoderblock_{i}/"
            places[name] = layer(found[2], to, i if scan else None)
        elif name == "attn_pool.latent":
            places[name] = at(f"{pool}probe")
        elif name.startswith("attn_pool."):
            places[name] = layer(name.removeprefix("attn_pool."), pool or "")
        elif name == "cls_token":
            places[name] = at("cls")
        elif name == "pos_embed" and table is not None:
            places[name] = at(table)
        elif name.startswith("norm."):
            places[name] = at(f"Transformer/encoder_norm/{scale[what]}")
        elif name.startswith("patch_embed.proj."):
            places[name] = at(f"embedding/{kernel[what]}", **(CONV if what == "weight" else {}))
        elif name.startswith("patch_embed.backbone."):
            places[name] = _of_backbone(name.removeprefix("patch_embed.backbone."))
        else:  # pre_logits.fc., head.
            places[name] = at(f"{name.split('.')[0]}/{kernel[what]}", **(DENSE if what == "weight" else {}))
    return places


def _of_backbone(name: str) -> Any:
    *path, layer, what = name.split(".")
    unit = ""
    if path[:1] == ["stages"]:
        unit = f"block{int(path[1]) + 1}/unit{int(path[3]) + 1}/"
        number = "_proj" if path[-1] == "downsample" else layer[-1]
    else:
        number = "_root"
    if layer.startswith("conv"):
        return at(f"{unit}conv{number}/kernel", **CONV)
    return at(f"{unit}gn{number}/{'scale' if what == 'weight' else 'bias'}", **FLAT)


# ---- BiT


def _resnet(tensors: Tensors, root: str, given: dict[str, Any]) -> Source:
    """Return a BiT ResNet, under the names of its first code, or big_vision's."""
    prefix, _, rest = root.rpartition("root_block/")
    plain = {re.sub(r"standardized_conv2d_\d+/", "standardized_conv2d/", name): name for name in tensors.shapes}
    plain = {name.removeprefix(prefix): real for name, real in plain.items() if name.startswith(prefix)}
    shapes = {name: tensors.shapes[real] for name, real in plain.items()}
    first = rest.startswith("standardized_conv2d")
    head = "head/conv2d/bias" if first else "head/bias"
    found: dict[str, Any] = {"width": tensors.shapes[root][-1]}
    found["units"] = [
        depth_of(shapes, f"block{b + 1}/unit", "/") - 1 for b in range(depth_of(shapes, "block", "/") - 1)
    ]
    found["num_classes"] = shapes[head][0] if head in shapes else 0
    found |= given
    if "image_size" not in found:
        raise ask(tensors.where, "the size of its images", "image_size=224")
    made = Source("official .npz", named(ResNet, found), tensors.read)
    inside = Tensors(
        tensors.where, shapes, lambda name: tensors.read(plain[name]), lambda name, i: tensors.row(plain[name], i), {}
    )
    return read(inside, made, _first_bit(made) if first else _big_visions_bit(made))


def _first_bit(source: Source, prefix: str = "") -> Places:
    """Return the places of big_transfer's names."""
    places: Places = {}
    gains = {"weight": "gamma", "bias": "beta"}
    for name in source.parameters():
        *path, layer, what = name.split(".")
        if name.startswith("head.fc."):
            to, how = ("kernel", CONV) if what == "weight" else ("bias", {})
            places[name] = at(f"{prefix}head/conv2d/{to}", **how)
        elif path == ["stem"]:
            places[name] = at(f"{prefix}root_block/standardized_conv2d/kernel", **CONV)
        elif not path:  # the last norm
            places[name] = at(f"{prefix}group_norm/{gains[what]}")
        else:
            unit = f"{prefix}block{int(path[1]) + 1}/unit{int(path[3]) + 1:02d}/"
            part = "a/proj" if path[-1] == "downsample" else "abc"[int(layer[-1]) - 1]
            if layer.startswith("conv"):
                places[name] = at(f"{unit}{part}/standardized_conv2d/kernel", **CONV)
            else:
                places[name] = at(f"{unit}{part}/group_norm/{gains[what]}")
    return places


def _big_visions_bit(source: Source) -> Places:
    places: Places = {}
    for name in source.parameters():
        *path, layer, what = name.split(".")
        scale = "scale" if what == "weight" else "bias"
        if name.startswith("head.fc."):
            kernel = at("head/kernel", ours=lambda value: value.mT[:, :, None, None])
            places[name] = kernel if what == "weight" else at("head/bias")
        elif path == ["stem"]:
            places[name] = at("root_block/conv_root/kernel", **CONV)
        elif not path:
            places[name] = at(f"norm-pre-head/{scale}", **FLAT)
        else:
            unit = f"block{int(path[1]) + 1}/unit{int(path[3]) + 1:02d}/"
            number = "_proj" if path[-1] == "downsample" else layer[-1]
            convolution = layer.startswith("conv")
            to = f"{unit}conv{number}/kernel" if convolution else f"{unit}gn{number}/{scale}"
            places[name] = at(to, **(CONV if convolution else FLAT))
    return places


# ---- writing


def refusal(made: nn.Module) -> str | None:
    """Return what official files lack of a model, and what to do; None where they can say all of it."""
    if type(made) is ResNet:
        return None
    if type(made) is not VisionTransformer:
        return f"a {type(made).__name__}: there is no official code of it"
    return next((what for lacks, what in (
        (made.gelu != "tanh", "the exact GELU: the official code has its approximation by tanh. Of weights that came "
         "from there, --set gelu=tanh says so"),
        (made.norm_eps != 1e-6, f"layer norms with epsilon {made.norm_eps}, where the official code has 1e-6. Of "
         "weights that came from there, --set norm_eps=1e-6 says so"),
        (not made.qkv_bias, "queries, keys and values without biases"),
        (made.registers > 0, "registers"),
        (made.position == "relative" or made.position_at != "stem", "positions inside the blocks"),
        (made.patch_target is not None, "a head on every patch; take it off with --classes 0"),
    ) if lacks), None)  # fmt: skip


def write(path: Path, source: Source, cast: Callable[[Tensor], Tensor], note: dict[str, Any]) -> None:
    """Write an official file: a ViT's or hybrid's with the names of the released ones, a BiT's with BiT's.

    A MAP head is big_vision's alone, and so are the names of a model that has one.
    """
    made = source.template()
    if type(made) is ResNet:
        places = _first_bit(source, "resnet/")
    elif made.pooling == "map":
        places = _places(source, old=False, table="pos_embedding", pool="MAPHead_0/")
        places = {name: replace(at, names=tuple(f"params/{n}" for n in at.names)) for name, at in places.items()}
    else:
        places = _places(source, old=True, table="Transformer/posembed_input/pos_embedding")
    like, tensor = write_places(source, places)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name in like:
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(member, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, _as_array(cast(tensor(name))), allow_pickle=False)
        archive.comment = _comment(note)


def change_note(path: Path, note: dict[str, Any]) -> None:
    """Put another note into a written file: the archive's comment, which no reader of arrays sees."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = _comment(note)


def _comment(note: dict[str, Any]) -> bytes:
    comment = zlib.compress(json.dumps(note).encode(), 9)
    if len(comment) > zipfile.ZIP_MAX_COMMENT:
        raise UserError(
            f"the class names are too long for a .npz ({len(comment)} bytes of {zipfile.ZIP_MAX_COMMENT}); write "
            "--to safetensors, or take the head off with --classes 0"
        )
    return comment


def _as_array(value: Tensor) -> np.ndarray:
    value = value.contiguous()
    return value.view(torch.int16).numpy().view("V2") if value.dtype == torch.bfloat16 else value.numpy()
