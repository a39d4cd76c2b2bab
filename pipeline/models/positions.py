"""Position embeddings: the kinds of appendix D.4 and the fixed ones of MoCo v3, and how they go to another resolution.

* ``learned``: one vector for each token in raster order, the class token first (equation 1).
* ``learned_2d``: half a vector for each column and half a one for each row, put together.
* ``sincos_2d``: the same with sines and cosines in the place of what is learned, as big_vision makes them.
* ``sincos_2d_moco``: the same with the wavelengths of MoCo v3 and MAE, which end before 10,000.
* ``relative``: one key for each offset between two patches in raster order. A query's product with the key of the
  offset is added to its product with the other patch's own key, under the same 1 / sqrt(d).
* ``none``.

Only ``learned`` gives the class token a place: elsewhere it is no part of the image, so nothing is added to it, nor to
what it attends to. Registers have no place anywhere.

Legend of the shape comments: n images, g x g patches, N = g*g of them, T tokens, D width, h heads, d = D / h.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from shards.errors import UserError

FIXED = ("sincos_2d", "sincos_2d_moco")
KINDS = ("learned", "learned_2d", "relative", *FIXED, "none")
# At the first block's input, at every block's with values of its own, or at every block's with the same.
PLACES = ("stem", "every", "shared")


@dataclass(frozen=True)
class Positions:
    """The position embeddings of a model.

    Args:
        kind: one of ``KINDS``.
        place: one of ``PLACES``; ``relative`` works inside attention, at every block.
        grid: patches g along a side.
        embed_dim: width D of the tokens.
        class_token: whether one comes before the patches.
        registers: tokens after the patches.

    Raises:
        UserError: there are none such.
    """

    kind: str
    place: str
    grid: int
    embed_dim: int
    class_token: bool
    registers: int

    def __post_init__(self) -> None:
        for name, value, known in (("position", self.kind, KINDS), ("position_at", self.place, PLACES)):
            if value not in known:
                raise UserError(f"unknown {name}: {value!r}; take one of {', '.join(known)}")
        if self.kind == "relative" and self.place == "stem":
            raise UserError("position 'relative' works in attention; set position_at to 'every' or 'shared'")
        if self.kind == "none" and self.place != "stem":
            raise UserError(f"position 'none' has nothing to put at position_at {self.place!r}; leave position_at out")
        if self.kind in FIXED and self.place == "every":
            raise UserError(f"position {self.kind!r} is fixed, so no block has its own; set position_at to 'shared'")
        if self.kind == "learned_2d" and self.embed_dim % 2:
            raise UserError(f"embed_dim {self.embed_dim} is odd, and position 'learned_2d' halves it; take an even one")
        if self.kind in FIXED and (self.embed_dim % 4 or self.embed_dim < 8):
            raise UserError(f"width {self.embed_dim} does not suit {self.kind!r}; take a multiple of 4, at least 8")

    def empty(self) -> Tensor | None:
        """Return the memory of the parameter behind learned position embeddings; None where nothing is learned."""
        shapes = {
            "learned": (self.class_token + self.grid**2, self.embed_dim),
            "learned_2d": (2 * self.grid, self.embed_dim // 2),  # g columns, then g rows
            "relative": (2 * self.grid**2 - 1, self.embed_dim),  # from offset -(N-1) to N-1, heads side by side
        }
        return torch.empty(1, *shapes[self.kind]) if self.kind in shapes else None

    def sincos(self) -> Tensor:
        """Return fixed position embeddings, [1, T, D]."""
        steps = self.embed_dim // 4 - (self.kind == "sincos_2d")
        omega = 10_000.0 ** -(np.arange(self.embed_dim // 4) / steps)  # [D/4]
        rows, columns = np.divmod(np.arange(self.grid**2), self.grid)
        x, y = columns[:, None] * omega, rows[:, None] * omega  # each [N, D/4]
        table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
        return torch.tensor(np.pad(table, ((int(self.class_token), self.registers), (0, 0))).astype(np.float32))[None]

    def table(self, pos_embed: Tensor) -> Tensor:
        """Return what is added to the tokens, [1, T, D], from the parameter of a kind that is added."""
        if self.kind in FIXED:
            return pos_embed
        if self.kind == "learned":
            return F.pad(pos_embed, (0, 0, 0, self.registers)) if self.registers else pos_embed
        columns, rows = pos_embed.chunk(2, dim=1)  # each [1, g, D/2]
        columns = columns[:, None].expand(-1, self.grid, -1, -1)  # [1, g, g, D/2], the same in each row
        rows = rows[:, :, None].expand(-1, -1, self.grid, -1)
        table = torch.cat([columns, rows], dim=3).flatten(1, 2)  # [1, N, D]
        return F.pad(table, (0, 0, int(self.class_token), self.registers))

    def relative_logits(self, q: Tensor, keys: Tensor) -> Tensor:
        """Return what relative positions add to the logits of attention, before the softmax.

        Args:
            q: queries [n, h, T, d].
            keys: keys of the offsets between patches, [1, 2N-1, D]; the offset of a key from a query is its place in
                raster order less the query's.

        Returns:
            [n, h, T, T], queries by keys; zeros where either is no patch.
        """
        heads, d = q.shape[1], q.shape[3]
        first, patches = int(self.class_token), self.grid**2
        keys = F.pad(keys.view(-1, heads, d).permute(1, 2, 0), (0, 1))  # [h, d, 2N], the last of no offset
        logits = q[:, :, first : first + patches] @ keys * d**-0.5  # [n, h, N, 2N]
        # In row i the patches begin at N-1 - i. Cut anew into rows shorter by one, row i is i further left than it was,
        # and all begin at N-1.
        logits = logits.flatten(2)[..., :-patches].unflatten(2, (patches, -1))[..., patches - 1 :]  # [n, h, N, N]
        return F.pad(logits, (first, self.registers, first, self.registers))

    def resize(self, pos_embed: Tensor) -> Tensor:
        """Bring the parameter of another grid to this one, in its dtype.

        Columns and rows are stretched as lines, end to end; ``learned`` as ``interpolate_pos_embed`` says.

        Raises:
            UserError: the kind is ``relative``: an offset in raster order is several of rows and columns, and others
                on another grid.
        """
        if self.kind == "learned":
            return interpolate_pos_embed(pos_embed, self.grid, self.class_token)
        if self.kind == "learned_2d":
            return torch.cat([_stretched(line, self.grid) for line in pos_embed.chunk(2, dim=1)], dim=1)
        old = math.isqrt((pos_embed.shape[1] + 1) // 2)
        raise UserError(
            f"position 'relative' of a grid of {old} x {old} patches cannot go to {self.grid} x {self.grid}: its "
            "offsets in raster order mean other places there; stay at that resolution, or take another position"
        )


def interpolate_pos_embed(pos_embed: Tensor, new_grid: int, class_token: bool = True) -> Tensor:
    """Stretch position embeddings to another grid, as the official ``scipy.ndimage.zoom`` of order 1 does.

    Args:
        pos_embed: [1, 1 + g*g, D], the class token's entry first, which is kept as it is; or [1, g*g, D].
        new_grid: patches along a side of the new images.
        class_token: whether there is such an entry.

    Returns:
        [1, 1 + new_grid**2, D] or [1, new_grid**2, D], of the same dtype.

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
    """Take [1, m, D] to [1, length, D], its ends onto the ends."""
    line, dtype = line.transpose(1, 2).float(), line.dtype
    return F.interpolate(line, size=length, mode="linear", align_corners=True).transpose(1, 2).to(dtype)
