"""Position embeddings, and how they go to another resolution."""

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from shards.errors import UserError


def interpolate_pos_embed(pos_embed: Tensor, new_grid: int) -> Tensor:
    """Stretch position embeddings to another grid, as the official ``scipy.ndimage.zoom`` of order 1 does.

    Args:
        pos_embed: [1, 1 + g*g, D], the class token's entry first; it is kept as it is.
        new_grid: patches along a side of the new images.

    Returns:
        [1, 1 + new_grid**2, D], of the same dtype.

    Raises:
        UserError: the old grid is not a square.
    """
    cls, grid = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(grid.shape[1])
    if side * side != grid.shape[1]:
        raise UserError(f"position embeddings of {grid.shape[1]} patches are no square grid; give square images")
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # [1, D, g, g]
    # Corner to corner: zoom maps the first and last entries of a row onto each other.
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bilinear", align_corners=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)
