"""What a sweep found, drawn: accuracy over the setting that it went through, or over compute beside the paper's."""

from collections import defaultdict
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from pipeline.figures.canvas import sheet
from pipeline.recipe import read_recipe, recipe_names
from pipeline.sweeps import Member, Swept, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAMILIES = {"bit": ("ResNet", "s", "C3"), "vit": ("ViT", "o", "C0"), "r": ("hybrid", "^", "C2")}
"""What a model's name begins with: in words, its marker, its colour."""
APART = 1.5  # ratio of the exaFLOPs of a sweep from which on they are drawn
POINTS = 3  # values of a setting from which on they are a curve


class Point(NamedTuple):
    """One of the paper's models: exaFLOPs of its pre-training, top-1 on ImageNet in per cent."""

    model: str
    exaflops: float
    top1: float


def draw(swept: Swept) -> "Figure | None":
    """Draw a sweep; None: it went through nothing that has an axis."""
    members = [member for member in swept.members if member.top1 is not None]
    if key := _axis(members):
        return _curves(swept.name, members, key)
    compute = [member.exaflops for member in members if member.exaflops]
    if len(compute) > 1 and max(compute) >= APART * min(compute):
        return _scaling(swept.name, [member for member in members if member.exaflops])
    return None


@lru_cache(maxsize=1)
def paper_points() -> list[Point]:
    """Return the models of the paper's Table 6, from the recipes that reproduce them."""
    points = []
    for recipe in map(read_recipe, recipe_names()):
        for found in recipe.about.expected:
            if found.source == "ViT paper, Table 6" and "ImageNet" in found.values:
                points.append(Point(recipe.about.model, recipe.about.exaflops, found.values["ImageNet"]))
    return points


def _axis(members: list[Member]) -> str | None:
    """Return the setting that a sweep went through: the first with numbers enough which is none of the model's."""
    keys = dict.fromkeys(key for member in members for key in member.changed)
    for key in keys:
        values = [member.changed.get(key) for member in members]
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if numbers and len(set(values)) >= POINTS and key != "seed" and not key.startswith("model."):
            return key
    return None


def _curves(name: str, members: list[Member], key: str) -> "Figure":
    """Draw accuracy over a setting, a curve for each combination of the others."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for member in members:
        others = ", ".join(f"{short(each)} {own}" for each, own in member.changed.items() if each != key)
        value = member.changed[key]
        if isinstance(value, (int, float)) and member.top1 is not None:
            curves[others].append((value, 100 * member.top1))
    figure, axis = _panel(name)
    for label, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, linewidth=1.4, label=label)
    if min(x for points in curves.values() for x, _ in points) > 0:
        axis.set_xscale("log")
    axis.set_xlabel(key)
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize=7)
    return figure


def _scaling(name: str, members: list[Member]) -> "Figure":
    """Draw accuracy over the exaFLOPs of pre-training; hollow are the paper's models on ImageNet."""
    figure, axis = _panel(name)
    ours = [(member.model, member.exaflops, 100 * member.top1) for member in members if member.top1 is not None]
    for points, filled in ((paper_points(), False), (ours, True)):
        for start, (family, marker, colour) in FAMILIES.items():
            there = [(x, y) for model, x, y in points if _family(model) == start]
            if there:
                label, inside = (family, colour) if filled else (f"{family}, paper's Table 6", "none")
                axis.plot(
                    *zip(*there, strict=True), marker, markersize=5, color=colour, markerfacecolor=inside, label=label
                )
    axis.set_xscale("log")
    axis.set_xlabel("exaFLOPs of pre-training")
    axis.legend(frameon=False, fontsize=7)
    return figure


def _panel(title: str) -> "tuple[Figure, Axes]":
    figure = sheet(5.6, 4.0)
    axis = figure.subplots()
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_ylabel("top-1 on held-out images (%)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)
    return figure, axis


def _family(model: str | None) -> str:
    """Return which of ``FAMILIES`` a model is of: all names but those of ResNets and hybrids are transformers'."""
    name = model or ""
    return "bit" if name.startswith("bit") else "r" if name.startswith("r") else "vit"
