"""Where the parameters of a model stand in another format, and how a value goes from one to the other."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.convert.source import Source
from pipeline.convert.tensors import Tensors
from shards.errors import UserError


def same(value: Tensor) -> Tensor:
    """Return the value."""
    return value


@dataclass(frozen=True)
class Place:
    """Where a parameter stands.

    Attributes:
        names: Of the tensors there; several are parts of it, one below the other, as q, k and v are.
        ours: Turns each of them into ours.
        theirs: Turns ours into each of them.
        row: Of a tensor that holds the same parameter of every block, which row it is.
    """

    names: tuple[str, ...]
    ours: Callable[[Tensor], Tensor] = same
    theirs: Callable[[Tensor], Tensor] = same
    row: int | None = None


SLACK = 2**24
"""Values that a model may seem to have beyond those of its file until each of them was read."""
Places = dict[str, Place]  # by our names


def at(*names: str, **how: Any) -> Place:
    """Return the place of a parameter; ``how`` as in ``Place``."""
    return Place(names, **how)


def read(tensors: Tensors, source: Source, places: Places, left: Iterable[str] = ()) -> Source:
    """Return a source whose values stand at these places.

    Args:
        tensors: To read from.
        source: Of which ``tensor`` is yet to be told.
        places: Of every parameter of its model.
        left: Names of tensors that are left behind: none of the model's.

    Raises:
        UserError: A parameter is not there, has another shape, or there is a tensor that the model has no place for.
    """
    used = {name for place in places.values() for name in place.names} | set(left)
    unknown = sorted(tensors.shapes.keys() - used)
    if unknown:
        raise UserError(
            f"{tensors.where} has {len(unknown)} tensors that no model here has a place for, such as {unknown[0]} "
            f"{list(tensors.shapes[unknown[0]])}: it is of another architecture"
        )
    for name, place in places.items():
        for each in place.names:
            if each not in tensors.shapes:
                raise UserError(f"{tensors.where} has no {each}, which would be {name}: a part of the model is missing")
    if left := sorted(left):
        print(f"left behind, as no part of the model: {len(left)} tensors, such as {left[0]}", file=sys.stderr)

    shapes = {name: parameter.shape for name, parameter in source.parameters().items()}
    has = {name: [tensors.shapes[each] for each in place.names] for name, place in places.items()}
    beyond = {name: shape.numel() - sum(map(math.prod, has[name])) for name, shape in shapes.items()}
    if sum(beyond.values()) > SLACK:  # before there is memory for such a model
        worst = max(beyond, key=beyond.__getitem__)
        there = has[worst][0] if len(has[worst]) == 1 else has[worst]
        raise _misfit(tensors, worst, places[worst], there, shapes[worst])

    def tensor(name: str) -> Tensor:
        place = places[name]
        if place.row is None:
            parts = [place.ours(tensors.read(each)) for each in place.names]
        else:
            parts = [place.ours(tensors.row(each, place.row)) for each in place.names]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if value.shape != shapes[name]:
            raise _misfit(tensors, name, place, value.shape, shapes[name])
        return value

    return replace(source, tensor=tensor)


def _misfit(tensors: Tensors, name: str, place: Place, has: Iterable[Any], wanted: Iterable[int]) -> UserError:
    there = " and ".join(place.names)
    there += f", which is {name}," if there != name else ""
    return UserError(
        f"{tensors.where} has {there} of shape {list(has)}, and not {list(wanted)}: say with --set what its model is"
    )


def write(source: Source, places: Places) -> tuple[dict[str, Tensor], Callable[[str], Tensor]]:
    """Return what the tensors of another format are like, by their names, and a function that gives each.

    The parts of a parameter should be asked for one after the other: it is read once for them.
    """
    like, where = {}, {}
    for name, parameter in source.parameters().items():
        place = places[name]
        for i, (each, part) in enumerate(zip(place.names, parameter.chunk(len(place.names)), strict=True)):
            like[each], where[each] = place.theirs(part), (name, i)
    kept: list[Any] = [None, None]

    def tensor(each: str) -> Tensor:
        name, i = where[each]
        if kept[0] != name:
            kept[:] = name, source.tensor(name)
        place = places[name]
        return place.theirs(kept[1].chunk(len(place.names))[i]).contiguous()

    return like, tensor


def depth_of(names: Iterable[str], before: str, after: str = ".") -> int:
    """Return how many blocks there are, by the numbers between ``before`` and ``after`` in names."""
    numbers = (name.removeprefix(before).partition(after)[0] for name in names if name.startswith(before))
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def side_of(tensors: Tensors, name: str, places: int) -> int:
    """Return the patches along a side of a grid of so many position embeddings."""
    side = round(places**0.5)
    if side * side != places:
        raise UserError(
            f"{tensors.where} has position embeddings {name} for {places} patches, which are no square; only models "
            "of square images are taken"
        )
    return side


WIDTHS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


def heads_of(tensors: Tensors, width: int, given: dict[str, Any]) -> int:
    """Return the attention heads: as the user says, or as ViTs of this width have them."""
    heads = given.get("num_heads", WIDTHS.get(width))
    if heads is None:
        raise UserError(
            f"{tensors.where} does not tell how many attention heads a width of {width} has; say it with --set "
            "num_heads=N"
        )
    return heads
