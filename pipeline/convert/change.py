"""A model at another resolution, or with other classes; its values change as they are read."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.convert.source import Source
from pipeline.models.initial import initial_value
from pipeline.models.positions import FIXED, Positions
from shards.errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESIZES = ("official", "bicubic")


def without_decoder(source: Source) -> Source:
    """Return the model without a decoder of masked autoencoding, which is of no use once its stage is over."""
    return replace(source, model={key: value for key, value in source.model.items() if not key.startswith("decoder_")})


def resized(source: Source, image_size: int, resize: str = "official") -> Source:
    """Return the model for images of another size: its position embeddings are stretched.

    Args:
        source: The model.
        image_size: Side of the images, in pixels.
        resize: "official", the zoom of the official code; or "bicubic", as timm does it.

    Raises:
        UserError: Its positions cannot go to that size.
    """
    if resize not in RESIZES:
        raise UserError(f"there is no resize {resize!r}; take one of {', '.join(RESIZES)}")
    changed = replace(source, model=source.model | {"image_size": image_size})
    shapes = {name: parameter.shape for name, parameter in changed.parameters().items()}
    positions = getattr(changed.template(), "positions", None)

    def tensor(name: str) -> Tensor:
        value = source.tensor(name)
        if name.rpartition(".")[2] != "pos_embed" or value.shape == shapes[name]:
            return value
        assert positions is not None  # whatever has such a parameter has them
        return positions.resize(value) if resize == "official" else bicubic(value, positions)

    return replace(changed, tensor=tensor)


def bicubic(pos_embed: Tensor, positions: Positions) -> Tensor:
    """Stretch learned position embeddings to another grid, as timm's ``resample_abs_pos_embed`` does.

    Args:
        pos_embed: [1, T, D], the class token's entry first if there is one, which is kept as it is.
        positions: Of the model that they go to.

    Returns:
        [1, T', D] of the same dtype.

    Raises:
        UserError: They are of another kind than "learned".
    """
    if positions.kind != "learned":
        raise UserError(f"bicubic does not suit position {positions.kind!r}; take --resize official")
    cls, grid = pos_embed.tensor_split([int(positions.class_token)], dim=1)
    side = math.isqrt(grid.shape[1])
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # [1, D, g, g]
    size = (positions.grid, positions.grid)
    grid = F.interpolate(grid, size=size, mode="bicubic", antialias=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def with_classes(source: Source, classes: str) -> Source:
    """Return the model with other classes.

    Args:
        source: The model.
        classes: A number: 0 takes every head off, another that is not the head's own makes a new one of zeros, in place
            of the whole old one, as fine-tuning does. Or a file of names, a line each, which names the head's outputs,
            or makes a new head where they are not as many.

    Raises:
        UserError: It is neither.
    """
    names = []
    if classes.isdigit():
        number = int(classes)
    elif Path(classes).is_file():
        names = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
        number = len(names)
    else:
        raise UserError(f"--classes {classes!r} is no number, and there is no such file of names; give one of them")
    if number == source.template().num_classes and not source.model.get("patch_target"):
        return replace(source, classes=names or source.classes)
    model = {key: value for key, value in source.model.items() if key not in ("patch_target", "head_bias")}
    model |= {"num_classes": number}
    if number and "representation" in model:
        model["representation"] = False
    changed = replace(source, model=model, classes=names)
    template = changed.template()

    def tensor(name: str) -> Tensor:
        if name.startswith("head."):
            return initial_value(template, name, tuple(template.get_parameter(name).shape), seed=0)
        return source.tensor(name)

    return replace(changed, tensor=tensor)


def learned(source: Source) -> Source:
    """Return the model with the position embeddings of its tokens as they are added: learned ones, for each a vector.

    What only knows these can say the other kinds that are added once, too. Of ``relative`` ones, and of those inside
    the blocks, nothing is changed.
    """
    template = source.template()
    positions = getattr(template, "positions", None)
    if (
        positions is None
        or positions.kind in ("learned", "relative")
        or positions.place != "stem"
        or positions.registers
    ):
        return source
    model = source.model | {"position": "learned"}

    def tensor(name: str) -> Tensor:
        if name != "pos_embed":
            return source.tensor(name)
        if positions.kind == "none":
            return torch.zeros(1, positions.class_token + positions.grid**2, positions.embed_dim)
        return positions.sincos() if positions.kind in FIXED else positions.table(source.tensor(name))

    return replace(source, model=model, tensor=tensor)


def caster(dtype: str) -> Callable[[Tensor], Tensor]:
    """Return a function that turns values into a dtype, by its name.

    Raises:
        UserError: There is no such dtype; or, of the function, what is finite would not be any more.
    """
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}; take one of {', '.join(DTYPES)}")

    def cast(value: Tensor) -> Tensor:
        found = value.to(DTYPES[dtype])
        if not found.is_meta and value.isfinite().all() and not found.isfinite().all():
            raise UserError(f"weights as large as {value.abs().max():.4g} do not go into {dtype}; take bfloat16")
        return found

    return cast
