"""The Axial-ViT of the paper's appendix D.6: attention along the rows of the grid of patches, then along its columns.

Each block of ViT is replaced by two, "a row-self-attention plus an MLP followed by a column-self-attention plus an
MLP", on inputs "in the 2-dimensional shape, instead of a 1-dimensional sequence of patches". There is no public code.
What these words leave open is decided thus:

* There is no class token, since a grid has no place for one: the head sees the mean of the patches, as it does in the
  official code for a model that ends on a grid (appendix D.3: as good as the token, with a lower learning rate).
* A position embedding is learned for each patch and added once, before the first block.
* Everything else, first values among it, is ViT's.
"""

from typing import Any

from torch import Tensor

from pipeline.models.vit import SIZES, Block, VisionTransformer

SETTINGS: dict[str, dict[str, Any]] = {f"axial_vit_b{patch}": {"patch_size": patch, **SIZES["b"]} for patch in (16, 32)}


class AxialBlock(Block):
    """A block of ViT whose tokens see those of their own row, or of their own column, alone."""

    def __init__(self, *arguments: Any, columns: bool):
        super().__init__(*arguments)
        self.columns = columns

    def forward(self, x: Tensor, draws: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        """Map the patches [n, g*g, D] to the same; ``draws`` are [n, 2], as in ViT, and nothing is ``shared``."""
        g = self.positions.grid
        grid = x.unflatten(1, (g, g))  # [n, rows, columns, D]
        lines = (grid.transpose(1, 2) if self.columns else grid).flatten(0, 1)  # [n*g, g, D]
        lines = super().forward(lines, None if draws is None else draws.repeat_interleave(g, dim=0))
        grid = lines.unflatten(0, (-1, g))
        return (grid.transpose(1, 2) if self.columns else grid).flatten(1, 2)


class AxialTransformer(VisionTransformer):
    """The Axial-ViT.

    Args:
        depth: number of pairs of blocks, rows then columns; ``blocks`` has twice as many, and so have ``draws``.

    The others are those of ``VisionTransformer``.
    """

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        image_size: int = 224,
        mlp_dim: int | None = None,
        num_classes: int = 1000,
        representation: bool = False,
        gelu: str = "tanh",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        head_bias: float | str = 0.0,
    ):
        super().__init__(
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=2 * depth,
            num_heads=num_heads,
            image_size=image_size,
            mlp_dim=mlp_dim,
            num_classes=num_classes,
            pooling="mean",
            representation=representation,
            gelu=gelu,
            dropout=dropout,
            drop_path=drop_path,
            head_bias=head_bias,
        )
        self.depth = depth

    def new_block(self, i: int, *arguments: Any) -> AxialBlock:
        """Return block ``i``, of rows where it is even."""
        return AxialBlock(*arguments, columns=i % 2 == 1)
