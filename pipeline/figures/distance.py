"""How far each head looks: the mean distance of what it attends to (paper, figures 7 right and 11)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.figures.attention import watched
from pipeline.figures.canvas import sheet
from pipeline.models.vit import VisionTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = 128  # as many as the paper averages over
AT_ONCE = 4


def patch_distances(grid: int, span: int) -> Tensor:
    """Return the distances in pixels between the middles of patches of side ``span``, float64 [g*g, g*g]."""
    at = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).double() * span
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def mean_attention_distance(weights: Tensor, grid: int, span: int, first: int) -> Tensor:
    """Return the mean distance of what patches attend to, in pixels, by image and head.

    The class token and registers have no place, so a query's weights are those of patches alone, made to sum to 1.
    (What the paper does with the class token it does not say.)

    Args:
        weights: [n, h, T, T], of a block.
        grid: Patches g along a side.
        span: Side of a patch in pixels of the image.
        first: Where the patches begin among the T tokens.

    Returns:
        float64 [n, h].
    """
    patches = slice(first, first + grid**2)
    weights = weights[:, :, patches, patches].double()  # [n, h, N, N]
    weights = weights / weights.sum(dim=3, keepdim=True)
    return (weights * patch_distances(grid, span).to(weights.device)).sum(dim=3).mean(dim=2)


@torch.no_grad()
def attention_distances(model: VisionTransformer, images: Tensor) -> np.ndarray:
    """Return the mean attention distance of each block and head over images [n, 3, H, W]: float64 [L, h], pixels."""
    first, span = int(model.positions.class_token), model.image_size // model.grid
    total = torch.zeros(len(model.blocks), model.num_heads, dtype=torch.float64)

    def see(block: int, weights: Tensor) -> None:
        total[block] += mean_attention_distance(weights, model.grid, span, first).sum(0).cpu()

    with watched(model, see):
        for part in images.split(AT_ONCE):
            model(part)
    return (total / len(images)).numpy()


def draw(distances: np.ndarray, grid: int, span: int, images: int) -> "Figure":
    """Draw distances [L, h] over the depth, a dot a head; grey is what a head that looks everywhere alike has."""
    figure = sheet(5.2, 4.0)
    axis = figure.subplots()
    for head in range(distances.shape[1]):
        axis.plot(range(1, len(distances) + 1), distances[:, head], "o", markersize=3)
    axis.axhline(patch_distances(grid, span).mean().item(), color="0.7", linewidth=1, zorder=0)
    axis.locator_params(axis="x", integer=True)
    axis.set_xlabel("block")
    axis.set_ylabel("mean attention distance (pixels)")
    axis.set_ylim(bottom=0)
    axis.set_title(f"{distances.shape[1]} heads a block, mean of {images} images of {grid * span} pixels", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
