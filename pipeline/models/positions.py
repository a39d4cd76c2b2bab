"""Position embeddings: the kinds of appendix D.4 and the fixed one of MoCo v3, and how they go to another resolution.

* ``learned``: one vector for each token in raster order, the class token first (equation 1).
* ``learned_2d``: half a vector for each column and half a one for each row, put together.
* ``sincos_2d``: the same with sines and cosines in the place of what is learned.
* ``relative``: one key for each offset between two patches in raster order. A query's product with the key of the offset
  is added to its product with the other patch's own key, under the same 1 / sqrt(d).
* ``none``.

Only ``learned`` gives the class token a place: in all others it is no part of the image, so nothing is added to it, nor to
its attention. Registers have no place in any.

Legend of the shape comments: g x g patches, N = g*g of them, T tokens, D width, h heads, d = D / h.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from shards.errors import UserError

KINDS = ("learned", "learned_2d", "relative", "sincos_2d", "none")
# Added to the input of the first block, or of every one: own ones in each block, or the same ones.
PLACES = ("stem", "every", "shared")


def check_positions(kind: str, place: str, embed_dim: int) -> None:
    """Raise a UserError for position embeddings that do not exist."""
    if kind not in KINDS:
        raise UserError(f"unknown position: {kind!r}; take one of {', '.join(KINDS)}")
    if place not in PLACES:
        raise UserError(f"unknown position_at: {place!r}; take one of {', '.join(PLACES)}")
    if kind == "relative" and place == "stem":
        raise UserError(
            "position 'relative' works in attention, not at the stem; set position_at to 'every' or 'shared'"
        )
    if kind == "none" and place != "stem":
        raise UserError(f"position 'none' has nothing to put at position_at {place!r}; leave position_at out")
    if kind == "sincos_2d" and place == "every":
        raise UserError("position 'sincos_2d' is fixed, so no block has its own; set position_at to 'shared' or 'stem'")
    if kind == "learned_2d" and embed_dim % 2:
        raise UserError(f"embed_dim {embed_dim} is odd, and 'learned_2d' halves it; take an even one")
    if kind == "sincos_2d" and (embed_dim % 4 or embed_dim < 8):
        raise UserError(f"embed_dim {embed_dim} does not suit 'sincos_2d'; take a multiple of 4, at least 8")


def pos_embed_shape(kind: str, grid: int, embed_dim: int, class_token: bool) -> tuple[int, int, int] | None:
    """Return the shape of the parameter behind position embeddings of g x g patches; None where there is none."""
    shapes = {
        "learned": (1, class_token + grid**2, embed_dim),
        "learned_2d": (1, 2 * grid, embed_dim // 2),  # g columns, then g rows
        "relative": (1, 2 * grid**2 - 1, embed_dim),  # entry N-1 + (key's place - query's place), heads side by side
    }
    return shapes.get(kind)


def position_table(kind: str, pos_embed: Tensor, class_token: bool, registers: int) -> Tensor:
    """Return what is added to the tokens, [1, T, D], from the parameter of a kind that is added."""
    if kind == "learned":
        return F.pad(pos_embed, (0, 0, 0, registers)) if registers else pos_embed
    columns, rows = pos_embed.chunk(2, dim=1)  # each [1, g, D/2]
    grid = columns.shape[1]
    table = torch.cat([columns[:, None].expand(-1, grid, -1, -1), rows[:, :, None].expand(-1, -1, grid, -1)], dim=3)
    return F.pad(table.flatten(1, 2), (0, 0, int(class_token), registers))  # [1, g, g, D] -> [1, T, D]


def sincos_table(grid: int, embed_dim: int, class_token: bool, registers: int) -> np.ndarray:
    """Return the fixed table of MoCo v3 as big_vision makes it, float32 [1, T, D]; zeros for what is no patch."""
    omega = 10_000.0 ** -(np.arange(embed_dim // 4) / (embed_dim // 4 - 1))  # [D/4]
    rows, columns = np.divmod(np.arange(grid**2), grid)
    x, y = columns[:, None] * omega, rows[:, None] * omega  # each [N, D/4]
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    return np.pad(table, ((int(class_token), registers), (0, 0)))[None].astype(np.float32)


def relative_logits(q: Tensor, keys: Tensor, class_token: bool) -> Tensor:
    """Return what relative positions add to the logits of attention, before the softmax.

    Args:
        q: Queries [n, h, T, d]: perhaps the class token, then the patches, then registers.
        keys: Keys of the offsets [1, 2N-1, D].
        class_token: Whether there is one.

    Returns:
        [n, h, T, T], queries by keys; zeros where either is no patch.
    """
    heads, tokens, d = q.shape[1:]
    first, patches = int(class_token), (keys.shape[1] + 1) // 2
    keys = F.pad(keys.view(-1, heads, d).permute(1, 2, 0), (0, 1))  # [h, d, 2N], the last of no offset
    logits = q[:, :, first : first + patches] @ keys * d**-0.5  # [n, h, N, 2N]
    # In row i the patches' offsets begin N-1 - i to the right. Rows that are cut one shorter each begin where the one
    # before does, so that all begin at N-1.
    logits = logits.flatten(2)[..., :-patches].unflatten(2, (patches, -1))[..., patches - 1 :]  # [n, h, N, N]
    last = tokens - first - patches
    return F.pad(logits, (first, last, first, last))


def resize_pos_embed(kind: str, pos_embed: Tensor, grid: int, class_token: bool) -> Tensor:
    """Take the parameter behind position embeddings to another grid.

    Args:
        kind: Of position embeddings.
        pos_embed: As ``pos_embed_shape`` says, for the old grid.
        grid: Patches along a side of the new images.
        class_token: Whether the first entry of ``learned`` is a class token's, which is kept as it is.

    Returns:
        The same for the new grid, of the same dtype. Columns, rows and offsets are stretched end to end, each as a line.

    Raises:
        UserError: The old grid is not a square.
    """
    if kind == "learned":
        return interpolate_pos_embed(pos_embed, grid, class_token)
    if kind == "learned_2d":
        return torch.cat([_stretched(half, grid) for half in pos_embed.chunk(2, dim=1)], dim=1)
    return _stretched(pos_embed, 2 * grid**2 - 1)


def interpolate_pos_embed(pos_embed: Tensor, new_grid: int, class_token: bool = True) -> Tensor:
    """Stretch learned position embeddings to another grid, as the official ``scipy.ndimage.zoom`` of order 1 does.

    Args:
        pos_embed: [1, g*g, D], or [1, 1 + g*g, D] with the class token's entry first; that is kept as it is.
        new_grid: patches along a side of the new images.
        class_token: whether there is such an entry.

    Returns:
        [1, new_grid**2, D] or [1, 1 + new_grid**2, D], of the same dtype.

    Raises:
        UserError: the old grid is not a square.
    """
    cls, grid = pos_embed.tensor_split([int(class_token)], dim=1)
    side = math.isqrt(grid.shape[1])
    if side * side != grid.shape[1]:
        raise UserError(f"position embeddings of {grid.shape[1]} patches are no square grid; give square images")
    grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()  # [1, D, g, g]
    # Corner to corner: zoom maps the first and last entries of a row onto each other.
    grid = F.interpolate(grid, size=(new_grid, new_grid), mode="bilinear", align_corners=True)
    return torch.cat([cls, grid.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def _stretched(line: Tensor, length: int) -> Tensor:
    """Take [1, m, D] to [1, length, D], the ends onto the ends."""
    stretched = F.interpolate(line.transpose(1, 2).float(), size=length, mode="linear", align_corners=True)
    return stretched.transpose(1, 2).to(line.dtype)
