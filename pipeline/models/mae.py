"""The decoder of masked autoencoding: from what an encoder makes of the patches it sees, the pixels of all.

Source: "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), section 3, and for what it leaves open
the authors' code. What is called ``decoder_NAME`` in their checkpoints is ``decoder.NAME`` here, and their
``mask_token`` is ``decoder.mask_token``.
"""

from functools import partial

import torch
from torch import Tensor, nn

from pipeline.models.layers import LayerNorm, Linear, normal, xavier_uniform
from pipeline.models.positions import Positions


class Decoder(nn.Module):
    """A small transformer over all patches; of those that the encoder did not see it gets a learned token.

    Args:
        embed_dim: width D of the encoder's tokens.
        positions: of the decoder's tokens, fixed, whose width W is the decoder's.
        blocks: of the decoder.
        outputs: values of a patch, 3 P P.
    """

    pos_embed: Tensor

    def __init__(self, embed_dim: int, positions: Positions, blocks: list[nn.Module], outputs: int):
        super().__init__()
        self.positions = positions
        self.embed = Linear(embed_dim, positions.embed_dim, weight=xavier_uniform)
        self.mask_token = nn.Parameter(torch.empty(1, 1, positions.embed_dim))
        self.begin = {"mask_token": partial(normal, std=0.02)}
        self.register_buffer("pos_embed", positions.sincos(), persistent=False)
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(positions.embed_dim)
        self.pred = Linear(positions.embed_dim, outputs, weight=xavier_uniform)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return the values of every patch, [n, N, 3 P P].

        Args:
            x: normed tokens of the encoder: a class token if there is one, then the visible patches, [n, 1 + v, D].
            visible: int64 [n, v], which patches these are.
        """
        first = int(self.positions.class_token)
        cls, seen = self.embed(x).tensor_split([first], dim=1)  # [n, 1, W], [n, v, W]
        where = visible[:, :, None].expand(-1, -1, seen.shape[2])
        masks = self.mask_token.to(seen.dtype).expand(len(x), self.positions.grid**2, -1)
        x = torch.cat([cls, masks.scatter(1, where, seen)], dim=1)  # [n, 1 + N, W]
        x = x.to(self.norm.weight.dtype) + self.pos_embed  # autocast leaves the residuals in full precision
        for block in self.blocks:
            x = block(x)
        return self.pred(self.norm(x[:, first:]))
