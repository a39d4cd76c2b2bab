"""How alike the position embeddings of patches are (paper, figures 7 centre and 10)."""

from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline.figures.canvas import sheet
from pipeline.models.vit import VisionTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def position_table(model: VisionTransformer) -> Tensor | None:
    """Return what the model adds to its patches before the first block, [g*g, D]; None: it adds nothing of the kind."""
    if model.pos_embed is None or model.position == "relative":  # which has keys of offsets
        return None
    table = model.positions.table(model.pos_embed)[0].detach().float().cpu()  # [T, D]
    return table[int(model.positions.class_token) :][: model.grid**2]


def position_similarity(table: Tensor) -> Tensor:
    """Return the cosine similarity of each patch's embedding with each other's, [g*g, g*g], of a table [g*g, D]."""
    table = F.normalize(table.double(), dim=1)
    return table @ table.T


def mosaic(similarity: Tensor, grid: int) -> np.ndarray:
    """Lay the tiles of all patches out as the patches lie, with a gap of NaN between: [g*(g+1)-1, g*(g+1)-1]."""
    tiles = np.full(
        (grid, grid + 1, grid, grid + 1), np.nan
    )  # row of the tile, within it, column of the tile, within it
    tiles[:, :grid, :, :grid] = similarity.view(grid, grid, grid, grid).permute(0, 2, 1, 3).numpy()
    return tiles.reshape(grid * (grid + 1), -1)[:-1, :-1]


def draw(table: Tensor) -> "Figure":
    """Draw a tile of each patch: how alike its embedding is with that of each patch of the grid."""
    grid = round(len(table) ** 0.5)
    figure = sheet(6.4, 5.6)
    axis = figure.subplots()
    # One picture: a thousand axes take a minute.
    image = axis.imshow(mosaic(position_similarity(table), grid), vmin=-1, vmax=1, interpolation="nearest")
    every = -(-grid // 16)
    middles = np.arange(0, grid, every) * (grid + 1) + (grid - 1) / 2
    for which in ("x", "y"):
        axis.tick_params(which, length=0, labelsize=7)
    names = [str(number) for number in range(1, grid + 1, every)]
    axis.set_xticks(middles, names)
    axis.set_yticks(middles, names)
    axis.spines[:].set_visible(False)
    axis.set_title("cosine similarity of position embeddings, a tile a patch", fontsize=9)
    axis.set_xlabel("column of the patch", fontsize=8)
    axis.set_ylabel("row of the patch", fontsize=8)
    figure.colorbar(image, ax=axis, shrink=0.7).ax.tick_params(labelsize=7)
    return figure
