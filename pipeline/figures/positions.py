"""How alike the position embeddings of patches are (paper, figures 7 centre and 10)."""

from typing import TYPE_CHECKING

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


def draw(table: Tensor) -> "Figure":
    """Draw a tile of each patch: how alike its embedding is with that of each patch of the grid."""
    grid = round(len(table) ** 0.5)
    similarity = position_similarity(table).view(grid, grid, grid, grid).numpy()
    figure = sheet(6.6, 5.8)
    figure.suptitle("cosine similarity of position embeddings, a tile a patch", fontsize=9)
    axes = figure.subplots(grid, grid, squeeze=False)
    for row in range(grid):
        for column in range(grid):
            axis = axes[row, column]
            image = axis.imshow(similarity[row, column], vmin=-1, vmax=1, cmap="viridis")
            axis.set_xticks([])
            axis.set_yticks([])
    axes[-1, grid // 2].set_xlabel("column of the patch", fontsize=8)
    axes[grid // 2, 0].set_ylabel("row of the patch", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.7).ax.tick_params(labelsize=7)
    return figure
