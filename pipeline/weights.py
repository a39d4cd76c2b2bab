"""Weights that a stage starts from, and how they become the first values of its model."""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config import TrainSettings
from pipeline.convert import safetensors
from pipeline.convert.source import Source
from pipeline.convert.tensors import NOTE
from pipeline.models import MODELS, Model, create_model
from pipeline.models.initial import initial_value
from pipeline.models.positions import FIXED
from pipeline.models.vit import VisionTransformer
from shards.atomic import whole_file
from shards.errors import UserError

# What a stage may set anew over the weights that it starts from. Every other setting of a model is an attribute of it.
OF_MASKING = {"patch_target", "decoder_depth", "decoder_dim", "decoder_heads"}
MAY_CHANGE = {"image_size", "num_classes", "representation", "dropout", "drop_path", "head_bias", *OF_MASKING}

DECODER = "decoder."  # of no use once its stage is over
OF_THE_OBJECTIVE = ("head.", "pre_logits.", "patch_head.", "mask_token")  # that other objectives do not train


def write_weights(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write a file of our own format; ``note`` needs the keys ``model`` and ``classes``."""
    with whole_file(path) as partial:
        safetensors.write(partial, tensors, tensors.__getitem__, {NOTE: json.dumps(note)})


def resolve_model(settings: TrainSettings, init: Source | None, num_classes: int) -> dict[str, Any]:
    """Return what ``create_model`` takes for a stage: the settings, over the weights it starts from.

    Fine-tuning drops the whole pre-training head, pre-logits included (vit-paper 1.5), and of the weights' dropout and
    stochastic depth nothing is left: it has what its own settings say.
    """
    wanted = settings.model.overrides()
    if settings.model.name is not None:
        wanted["name"] = settings.model.name
    noted = init.model if init else {}
    if settings.kind == "finetune":
        noted = noted | {rate: 0.0 for rate in ("dropout", "drop_path") if rate in noted}  # BiT takes neither
    base = noted | wanted
    if init is not None:
        _refuse_another_model(settings, init, wanted if "name" in wanted else base)
    base |= {"image_size": settings.data.resolution, "num_classes": num_classes}
    base = {key: value for key, value in base.items() if key not in OF_MASKING}
    if settings.kind == "finetune":
        base |= {"head_bias": 0.0} | ({"representation": False} if "representation" in base else {})
    if told := _told_of_patches(settings, base["name"]):
        base |= {"representation": False, "num_classes": 0} | told
    return base


def _told_of_patches(settings: TrainSettings, name: str) -> dict[str, Any]:
    """Return the settings of a model that tells something of patches; none of one for another kind of stage."""
    known = inspect.signature(MODELS[name][0]).parameters if name in MODELS else OF_MASKING
    if settings.kind == "masked_patch":
        if "patch_target" not in known:
            raise UserError(
                f"masked patch prediction wants a head on every patch, and {name!r} has no such head; take a ViT or "
                "hybrid"
            )
        return {"patch_target": settings.masked_patch.target}
    if settings.kind == "mae":
        if "decoder_depth" not in known:
            raise UserError(f"masked autoencoding wants a decoder of patches, and {name!r} has none; take a ViT")
        return settings.mae.decoder()
    return {}


def check_model(settings: TrainSettings, where: str) -> None:
    """Raise a UserError where a stage's model cannot be built; weights that a stage has yet to make are not asked."""
    if settings.model.name is not None:
        with _in_words_of_settings(where), torch.device("meta"):
            wanted = settings.model.overrides() | {"image_size": settings.data.resolution}
            wanted |= _told_of_patches(settings, settings.model.name)
            create_model(settings.model.name, **wanted, seed=None)


@contextmanager
def _in_words_of_settings(where: str | Path) -> Iterator[None]:
    """Let what is said of a model begin with ``where`` it is told, and call its image_size as a stage does."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {str(error).replace('image_size', 'data.resolution')}") from None


def first_values(template: Model, init: Source | None, settings: TrainSettings) -> Callable[[str, tuple], Tensor]:
    """Return ``value_of(name, shape)``: the first value of each parameter, from converted weights or from scratch.

    A new resolution stretches the position embeddings; fine-tuning starts its head at zero. Positions that were fixed
    may be learned from there on.
    """
    known = init.parameters() if init else {}

    def value_of(name: str, shape: tuple) -> Tensor:
        new_head = settings.kind == "finetune" and name.startswith("head.")
        if init is None or new_head or name.startswith(DECODER):
            return initial_value(template, name, shape, settings.seed)
        if name not in known and name.startswith(OF_THE_OBJECTIVE):
            raise UserError(
                f"{init.path} has no {name}, so no stage of kind {settings.kind!r} made it, and only kind 'finetune' "
                "makes a new head; take that, or weights of the same kind"
            )
        fixed = _fixed_positions(template, init) if name == "pos_embed" else None
        if name not in known and fixed is None:
            raise UserError(
                f"{init.path} has no {name}: it is a checkpoint of another model; use the model settings that made it"
            )
        value = init.tensor(name).float() if name in known else fixed
        assert value is not None  # one of the two is there
        if name.rpartition(".")[2] == "pos_embed" and value.shape != shape:
            assert isinstance(template, VisionTransformer)  # no other has positions
            value = template.positions.resize(value)
        if value.shape != shape:
            raise UserError(
                f"{init.path} has {name} of shape {list(value.shape)}, this model wants {list(shape)}: "
                "it is a checkpoint of another model; use the model settings that made it"
            )
        return value

    return value_of


def check_heads(settings: TrainSettings, init: Source, model: dict[str, Any]) -> None:
    """Raise a UserError where the heads of weights do not fit a stage's model, by shapes alone.

    Args:
        settings: Of the stage.
        init: That it starts from.
        model: What ``resolve_model`` says of both.
    """
    with torch.device("meta"):
        template = create_model(**model, seed=None)
    value_of = first_values(template, replace(init, tensor=init.parameters().__getitem__), settings)
    for name, parameter in template.named_parameters():
        if name.startswith(OF_THE_OBJECTIVE) and not (settings.kind == "finetune" and name.startswith("head.")):
            value_of(name, tuple(parameter.shape))


def _fixed_positions(template: Model, init: Source) -> Tensor | None:
    """Return the position embeddings of weights whose positions are fixed, as ones that are learned; else None."""
    kind = init.model.get("position")
    if kind not in FIXED or not isinstance(template, VisionTransformer):
        return None
    grid = template.grid * init.model["image_size"] // template.image_size
    return replace(template.positions, kind=kind, grid=grid, registers=0).sincos()


def _refuse_another_model(settings: TrainSettings, init: Source, named: dict[str, Any]) -> None:
    with _in_words_of_settings(init.path), torch.device("meta"):
        here = create_model(**(named | {"image_size": settings.data.resolution}), seed=None)
        there = create_model(**init.model, seed=None)

    def refuse(what: str, has: Any, said: Any) -> None:
        raise UserError(
            f"{init.path} is a checkpoint of another model: its {what} is {has}, the settings say {said}; "
            "leave [model] out, or use the settings that made it"
        )

    if type(here) is not type(there):
        refuse("name", init.model["name"], named["name"])
    if getattr(there, "position", None) in FIXED and here.position == "learned":
        there.position = here.position  # ``first_values`` makes them so
    for key in inspect.signature(type(there)).parameters:
        if key not in MAY_CHANGE and getattr(here, key) != getattr(there, key):
            refuse(key, getattr(there, key), getattr(here, key))
