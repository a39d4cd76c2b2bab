"""The Vision Transformer in its official form, with the parameter names of timm.

Source: "An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 1-4 and table 1, and for what the paper
leaves open (first values, epsilon, GELU, places of dropout) the official JAX code at
google-research/vision_transformer.

Legend of the shape comments: n images, g x g patches, T = 1 + g*g tokens, D width, h heads, d = D / h,
M width of the MLP, K classes, L blocks.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.models.layers import Conv2d, LayerNorm, Linear, Mlp, constant, lecun_normal, normal, xavier_uniform, zeros
from shards.errors import UserError

SIZES = {
    "ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "h": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
SETTINGS = {
    f"vit_{size}{patch}": {"patch_size": patch, **numbers}
    for size, numbers in SIZES.items()
    for patch in (8, 14, 16, 32)
}


class PatchEmbed(nn.Module):
    """Cut images into patches and project each: one convolution whose stride is its kernel size."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = Conv2d(3, embed_dim, patch_size, stride=patch_size, weight=lecun_normal)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [n, 3, H, W] into patch embeddings [n, g*g, D], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)  # [n, D, g, g] -> [n, g*g, D]


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v in one projection."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        # q, k and v are three layers, each of which begins as one.
        self.qkv = Linear(embed_dim, 3 * embed_dim, weight=partial(xavier_uniform, parts=3))
        self.proj = Linear(embed_dim, embed_dim, weight=xavier_uniform)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D]."""
        n, t, width = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, h, T, d]
        x = F.scaled_dot_product_attention(q, k, v)  # [n, h, T, d]
        return self.dropout(self.proj(x.transpose(1, 2).reshape(n, t, width)))


class Block(nn.Module):
    """One pre-norm encoder block: attention, then MLP, each with a residual that a sample may skip."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, gelu: str, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads, dropout)
        self.norm2 = LayerNorm(embed_dim)
        self.mlp = Mlp(embed_dim, mlp_dim, gelu, dropout)
        self.drop_path = drop_path

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D]; ``draws`` [n, 2] in [0, 1) say which samples skip a branch."""
        x = x + self._kept(self.attn(self.norm1(x)), draws, 0)
        return x + self._kept(self.mlp(self.norm2(x)), draws, 1)

    def _kept(self, branch: Tensor, draws: Tensor | None, which: int) -> Tensor:
        if draws is None or self.drop_path == 0:
            return branch
        kept = (draws[:, which] >= self.drop_path).to(branch.dtype) / (1 - self.drop_path)  # [n]
        return branch * kept[:, None, None]


class VisionTransformer(nn.Module):
    """The Vision Transformer with a class token.

    The constructor does not write values: use ``create_model``, ``init_parameters`` or load a state.

    Args:
        image_size: side of the square images, in pixels.
        patch_size: side of a patch, in pixels; it divides ``image_size``.
        embed_dim: width D of the tokens.
        depth: number L of blocks.
        num_heads: number h of attention heads; it divides ``embed_dim``.
        mlp_dim: width M of the MLPs; None means 4 D.
        num_classes: outputs of the head; 0 means no head.
        representation: put a hidden tanh layer of width D before the head (``pre_logits``), to pre-train.
        gelu: "tanh" (the approximation of the official JAX code) or "exact" (what timm and transformers run).
        dropout: rate after the position embeddings and after every dense layer but q, k, v and the head.
        drop_path: stochastic depth: the rate at the last block, growing linearly from 0 at the first.
        head_bias: first value of the head's bias (official ImageNet-21k runs: -10, with a sigmoid loss).

    Raises:
        UserError: numbers that do not fit each other.
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
        head_bias: float = 0.0,
    ):
        super().__init__()
        mlp_dim = 4 * embed_dim if mlp_dim is None else mlp_dim
        sizes = {"image_size": image_size, "patch_size": patch_size, "embed_dim": embed_dim}
        sizes |= {"depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} is too small: {size}; give at least 1")
        for name, rate in (("dropout", dropout), ("drop_path", drop_path)):
            if not 0 <= rate < 1:
                raise UserError(f"{name} is no rate: {rate}; give 0 or more and less than 1")
        if num_classes < 0:
            raise UserError(f"num_classes is negative: {num_classes}; give 0 for no head")
        if image_size % patch_size:
            raise UserError(
                f"image_size {image_size} is not divisible by patch_size {patch_size}; "
                f"take {image_size // patch_size * patch_size or patch_size}"
            )
        if embed_dim % num_heads:
            raise UserError(f"embed_dim {embed_dim} is not divisible by num_heads {num_heads}; take a divisor")
        if gelu not in ("tanh", "exact"):
            raise UserError(f"unknown gelu: {gelu!r}; take 'tanh' or 'exact'")

        self.image_size, self.patch_size, self.embed_dim = image_size, patch_size, embed_dim
        self.depth, self.num_heads, self.mlp_dim = depth, num_heads, mlp_dim
        self.num_classes, self.representation, self.gelu = num_classes, representation, gelu
        self.drop_path, self.head_bias = drop_path, head_bias

        tokens = 1 + (image_size // patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim))
        self.begin = {"cls_token": zeros, "pos_embed": partial(normal, std=0.02)}
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_dim, gelu, dropout, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = LayerNorm(embed_dim)
        self.pre_logits = (
            nn.Sequential(OrderedDict(fc=Linear(embed_dim, embed_dim, weight=lecun_normal), act=nn.Tanh()))
            if representation
            else nn.Identity()
        )
        self.head = (
            Linear(embed_dim, num_classes, weight=zeros, bias=partial(constant, number=head_bias))
            if num_classes
            else nn.Identity()
        )

    def forward(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return the logits.

        Args:
            images: float [n, 3, image_size, image_size].
            draws: float [n, depth, 2] uniform in [0, 1): the stochastic-depth draws of each sample, for its
                attention and MLP branches, so that a sample's draws need not depend on its rank or batch.
                Left out, a model in training mode draws its own.

        Returns:
            [n, K]; without a head the features, [n, D].
        """
        return self.head(self.features(images, draws))

    def features(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return what the head sees, [n, D]: the tanh layer's output, or without one the normed class token.

        Arguments as in ``forward``. Under ZeRO-3 only ``forward`` gathers the weights that this needs.
        """
        return self.pre_logits(self.tokens(images, draws)[:, 0])

    def tokens(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return all normed tokens [n, T, D], the class token first. Arguments as in ``forward``."""
        x = self.patch_embed(images)  # [n, g*g, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # [n, T, D]
        x = self.dropout(x + self.pos_embed)
        if not self.training or self.drop_path == 0:
            draws = None
        elif draws is None:
            draws = torch.rand(len(x), self.depth, 2, device=x.device)
        for i, block in enumerate(self.blocks):
            x = block(x, None if draws is None else draws[:, i])
        return self.norm(x)
