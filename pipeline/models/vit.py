"""The Vision Transformer in its official form, with the parameter names of timm.

Source: "An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 1-4 and table 1, and for what the paper
leaves open (first values, epsilon, GELU, places of dropout) the official JAX code at
google-research/vision_transformer.

Legend of the shape comments: n images, g x g patches, T = 1 + g*g tokens, D width, h heads, d = D / h,
M width of the MLP, K classes, L blocks.
"""

import hashlib
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

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

LAYER_NORM_EPS = 1e-6
# Standard deviation of a standard normal cut at +-2: what flax's lecun_normal divides by.
TRUNCATED_STD = 0.87962566


class Linear(nn.Linear):
    """A linear layer that is born without values: ``VisionTransformer.initial_value`` gives them."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is, so that building ViT-H costs no random numbers."""


class Conv2d(nn.Conv2d):
    """A convolution that is born without values: ``VisionTransformer.initial_value`` gives them."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class PatchEmbed(nn.Module):
    """Cut images into patches and project each: one convolution whose stride is its kernel size."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.proj = Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [n, 3, H, W] into patch embeddings [n, g*g, D], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)  # [n, D, g, g] -> [n, g*g, D]


class Attention(nn.Module):
    """Multi-head self-attention with q, k and v in one projection."""

    def __init__(self, embed_dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(embed_dim, 3 * embed_dim)
        self.proj = Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D]."""
        n, t, width = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [n, h, T, d]
        x = F.scaled_dot_product_attention(q, k, v)  # [n, h, T, d]
        return self.dropout(self.proj(x.transpose(1, 2).reshape(n, t, width)))


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, embed_dim: int, mlp_dim: int, gelu: str, dropout: float):
        super().__init__()
        self.fc1 = Linear(embed_dim, mlp_dim)
        self.act = nn.GELU(approximate="tanh" if gelu == "tanh" else "none")
        self.fc2 = Linear(mlp_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D], through [n, T, M]."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class Block(nn.Module):
    """One pre-norm encoder block: attention, then MLP, each with a residual that a sample may skip."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, gelu: str, dropout: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(embed_dim, num_heads, dropout)
        self.norm2 = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
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
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_dim, gelu, dropout, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.pre_logits = (
            nn.Sequential(OrderedDict(fc=Linear(embed_dim, embed_dim), act=nn.Tanh()))
            if representation
            else nn.Identity()
        )
        self.head = Linear(embed_dim, num_classes) if num_classes else nn.Identity()

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

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """Return the official first value of one parameter, a pure function of the arguments.

        Args:
            name: full name, such as "blocks.0.attn.qkv.weight".
            shape: full shape, before any sharding.
            seed: seed of the run; each parameter has its own stream, from a hash of (seed, name).

        Returns:
            A float32 CPU tensor of that shape.

        Raises:
            ValueError: the name is not one of this model's.
        """
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        value = torch.empty(shape, dtype=torch.float32, device="cpu")
        owner, _, kind = name.rpartition(".")
        layer = owner.rpartition(".")[2]
        if name == "pos_embed":
            return value.normal_(0, 0.02, generator=generator)
        if name == "head.bias":
            return value.fill_(self.head_bias)
        if name in ("cls_token", "head.weight"):
            return value.zero_()
        if layer.startswith("norm"):
            return value.fill_(1.0 if kind == "weight" else 0.0)
        if layer in ("fc1", "fc2") and kind == "bias":
            return value.normal_(0, 1e-6, generator=generator)
        if kind == "bias":
            return value.zero_()
        if name in ("patch_embed.proj.weight", "pre_logits.fc.weight"):
            std = math.prod(shape[1:]) ** -0.5 / TRUNCATED_STD
            return nn.init.trunc_normal_(value, 0, std, -2 * std, 2 * std, generator=generator)
        if layer in ("qkv", "proj", "fc1", "fc2"):
            fan_out = shape[0] // 3 if layer == "qkv" else shape[0]  # q, k and v are three layers, each Xavier
            limit = math.sqrt(6 / (shape[1] + fan_out))
            return value.uniform_(-limit, limit, generator=generator)
        raise ValueError(f"no such parameter in a Vision Transformer: {name}")


@torch.no_grad()
def init_parameters(model: VisionTransformer, seed: int) -> None:
    """Write the first value of every parameter of an unsharded model, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(model.initial_value(name, tuple(parameter.shape), seed))


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
