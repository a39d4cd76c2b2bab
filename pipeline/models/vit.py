"""The Vision Transformer in its official form, with the parameter names of timm.

Source: "An Image is Worth 16x16 Words" (arXiv 2010.11929), equations 1-4 and table 1, and for what the paper
leaves open (first values, epsilon, GELU, places of dropout) the official JAX code at
google-research/vision_transformer.

Legend of the shape comments: n images, g x g patches, N = g*g of them, T tokens, D width, h heads, d = D / h,
M width of the MLP, K classes, L blocks, R registers. Tokens: the class token if there is one, patches, registers.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.corruption import MASK
from pipeline.models import cpuattention
from pipeline.models.hybrid import HybridPatchEmbed, downsampling
from pipeline.models.layers import (
    Conv2d,
    LayerNorm,
    Linear,
    Mlp,
    head_fill,
    lecun_normal,
    normal,
    xavier_uniform,
    zeros,
)
from pipeline.models.mae import Decoder
from pipeline.models.positions import FIXED, Positions
from shards.errors import UserError

SIZES = {
    "ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "s": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "b": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "l": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "h": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
SETTINGS: dict[str, dict[str, Any]] = {
    f"vit_{size}{patch}": {"patch_size": patch, **numbers}
    for size, numbers in SIZES.items()
    for patch in (8, 14, 16, 32)
}
# The number in a hybrid's name is what a token stands for, not the patch: that is one pixel of the feature map. Only in
# r_vit_ti16 the number is wrong: the official code gives its root of /4 patches of 8, and so tokens of 32 x 32 pixels.
SETTINGS |= {
    "r50_vit_b16": {"backbone": [3, 4, 9], "patch_size": 1, **SIZES["b"]},
    "r50_vit_b32": {"backbone": [3, 4, 6, 3], "patch_size": 1, **SIZES["b"]},
    "r50_vit_l16": {"backbone": [3, 4, 9], "patch_size": 1, **SIZES["l"]},
    "r50_vit_l32": {"backbone": [3, 4, 6, 3], "patch_size": 1, **SIZES["l"]},
    "r26_vit_s32": {"backbone": [2, 2, 2, 2], "patch_size": 1, **SIZES["s"]},
    "r26_vit_b32": {"backbone": [2, 2, 2, 2], "patch_size": 1, **SIZES["b"]},
    "r_vit_ti16": {"backbone": [], "patch_size": 8, **SIZES["ti"]},
}

POOLINGS = ("cls", "mean", "map")

BINS = 8  # of each channel of a colour, in masked patch prediction
# What masked patch prediction may tell of a patch of 3 x P x P values, and how many outputs that takes.
PATCH_TARGETS = {
    "mean_color": lambda values: BINS**3,
    "mean_colors_4x4": lambda values: 16 * BINS**3,
    "pixels": lambda values: values,
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

    def __init__(self, embed_dim: int, num_heads: int, dropout: float, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        # q, k and v are three layers, each of which begins as one.
        begin = partial(xavier_uniform, parts=3)
        self.qkv = Linear(embed_dim, 3 * embed_dim, weight=begin, bias=zeros if qkv_bias else None)
        self.proj = Linear(embed_dim, embed_dim, weight=xavier_uniform)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D].

        ``bias`` makes of the queries [n, h, T, d] what is added to the logits of attention, [n, h, T, T].
        """
        n, t, width = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, width // self.num_heads)
        if bias is None and cpuattention.pays(qkv):
            return self.dropout(self.proj(cpuattention.attention(qkv)))
        # Each [n, h, T, d]. Unbound where they lie: their gradients are put together once, in the order qkv wants.
        q, k, v = (each.transpose(1, 2) for each in qkv.unbind(2))
        x = F.scaled_dot_product_attention(q, k, v, None if bias is None else bias(q))  # [n, h, T, d]
        return self.dropout(self.proj(x.transpose(1, 2).reshape(n, t, width)))


class Block(nn.Module):
    """One pre-norm encoder block: attention, then MLP, each with a residual that a sample may skip.

    ``positions`` are those of the model; with ``own_positions`` the block learns its own.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        mlp_dim: int,
        gelu: str,
        dropout: float,
        drop_path: float,
        qkv_bias: bool,
        norm_eps: float,
        positions: Positions,
        own_positions: bool,
    ):
        super().__init__()
        self.positions = positions
        learned = positions.empty() if own_positions else None
        self.pos_embed = None if learned is None else nn.Parameter(learned)
        self.begin = {"pos_embed": partial(normal, std=0.02)}
        self.norm1 = LayerNorm(embed_dim, norm_eps)
        self.attn = Attention(embed_dim, num_heads, dropout, qkv_bias)
        self.norm2 = LayerNorm(embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim, mlp_dim, gelu, dropout)
        self.drop_path = drop_path

    def forward(self, x: Tensor, draws: Tensor | None = None, shared: Tensor | None = None) -> Tensor:
        """Map tokens [n, T, D] to [n, T, D].

        ``draws`` [n, 2] in [0, 1) say which samples skip a branch; ``shared`` are positions not its own: keys of
        offsets, or what is added to the tokens, [1, T, D].
        """
        bias = None
        if self.positions.kind == "relative":
            keys = shared if self.pos_embed is None else self.pos_embed
            assert keys is not None  # of every block, or of its own
            bias = partial(self.positions.relative_logits, keys=keys)
        elif self.pos_embed is not None:
            x = x + self.positions.table(self.pos_embed)
        elif shared is not None:
            x = x + shared
        x = x + self._kept(self.attn(self.norm1(x), bias), draws, 0)
        return x + self._kept(self.mlp(self.norm2(x)), draws, 1)

    def _kept(self, branch: Tensor, draws: Tensor | None, which: int) -> Tensor:
        if draws is None or self.drop_path == 0:
            return branch
        kept = (draws[:, which] >= self.drop_path).to(branch.dtype) / (1 - self.drop_path)  # [n]
        return branch * kept[:, None, None]


class AttentionPool(nn.Module):
    """The MAP head of big_vision: one learned token asks all others, then an MLP with a residual."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, gelu: str, norm_eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.begin = {"latent": xavier_uniform}
        self.q = Linear(embed_dim, embed_dim, weight=xavier_uniform)
        self.kv = Linear(embed_dim, 2 * embed_dim, weight=partial(xavier_uniform, parts=2))
        self.proj = Linear(embed_dim, embed_dim, weight=xavier_uniform)
        self.norm = LayerNorm(embed_dim, norm_eps)
        self.mlp = Mlp(embed_dim, mlp_dim, gelu, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [n, T, D] to one of each image, [n, D]."""
        n, t, width = x.shape
        d = width // self.num_heads
        q = self.q(self.latent).view(1, 1, self.num_heads, d).transpose(1, 2).expand(n, -1, -1, -1)  # [n, h, 1, d]
        k, v = self.kv(x).view(n, t, 2, self.num_heads, d).permute(2, 0, 3, 1, 4).unbind(0)  # each [n, h, T, d]
        x = self.proj(F.scaled_dot_product_attention(q, k, v).reshape(n, width))
        return x + self.mlp(self.norm(x))


class VisionTransformer(nn.Module):
    """The Vision Transformer.

    The constructor does not write values: use ``create_model``, ``init_parameters`` or load a state.

    Args:
        image_size: side of the square images, in pixels.
        patch_size: side of a patch, in pixels; it divides ``image_size``. In a hybrid, in pixels of the feature map.
        embed_dim: width D of the tokens.
        depth: number L of blocks.
        num_heads: number h of attention heads; it divides ``embed_dim``.
        mlp_dim: width M of the MLPs; None means 4 D.
        num_classes: outputs of the head; 0 means no head.
        pooling: what the head sees of the normed tokens: "cls", the class token; "mean" of the patches; or "map", what
            one more layer of attention makes of the patches. Only "cls" has a class token, as in the official code.
        representation: put a hidden tanh layer of width D before the head (``pre_logits``), to pre-train.
        position: kind of position embeddings: "learned", "learned_2d", "relative", "sincos_2d", "sincos_2d_moco" or
            "none".
        position_at: "stem", the first block's input; "every" block's, with values of its own; or "shared", every
            block's, with the same values.
        registers: number R of learned tokens beside the patches, which have no position, and which no head sees.
        qkv_bias: whether q, k and v have biases.
        norm_eps: epsilon of the layer norms: 1e-6 in the official code; much that was made for transformers has 1e-12.
        gelu: "tanh" (the approximation of the official JAX code) or "exact" (what timm and transformers run).
        dropout: rate after the position embeddings of the stem and every dense layer but q, k, v and those of the head.
        drop_path: stochastic depth: the rate at the last block, growing linearly from 0 at the first; so that a model
            of one block has none.
        head_bias: first value of the head's bias, for a sigmoid loss: -10 in the official ImageNet-21k runs, or
            "log_prior", -ln K.
        backbone: makes a hybrid: units of each stage of the ResNet that the patches are cut from; [] is its root alone.
        backbone_width: channels of that ResNet's root.
        patch_target: for masked patch prediction: what a head on every patch tells of it, "mean_color",
            "mean_colors_4x4" or "pixels".
        decoder_depth: blocks of a decoder for masked autoencoding; 0 means no decoder.
        decoder_dim: its width.
        decoder_heads: its attention heads; it divides ``decoder_dim``.

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
        pooling: str = "cls",
        representation: bool = False,
        position: str = "learned",
        position_at: str = "stem",
        registers: int = 0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        gelu: str = "tanh",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        head_bias: float | str = 0.0,
        backbone: list[int] | None = None,
        backbone_width: int = 64,
        patch_target: str | None = None,
        decoder_depth: int = 0,
        decoder_dim: int = 512,
        decoder_heads: int = 16,
    ):
        super().__init__()
        mlp_dim = 4 * embed_dim if mlp_dim is None else mlp_dim
        sizes = {"image_size": image_size, "patch_size": patch_size, "embed_dim": embed_dim}
        sizes |= {"depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}
        sizes |= {"decoder_dim": decoder_dim, "decoder_heads": decoder_heads}
        for name, size in sizes.items():
            if size < 1:
                raise UserError(f"{name} is too small: {size}; give at least 1")
        for name, rate in (("dropout", dropout), ("drop_path", drop_path)):
            if not 0 <= rate < 1:
                raise UserError(f"{name} is no rate: {rate}; give 0 or more and less than 1")
        if norm_eps <= 0:
            raise UserError(f"norm_eps is not above 0: {norm_eps}; take 1e-6")
        for name, number in (("num_classes", num_classes), ("registers", registers), ("decoder_depth", decoder_depth)):
            if number < 0:
                raise UserError(f"{name} is negative: {number}; give 0 for none")
        # Pixels of the image that a token stands for, along a side.
        span = patch_size if backbone is None else patch_size * downsampling(backbone)
        if image_size % span:
            by = f"patch_size {span}" if backbone is None else f"{span}, the side of this hybrid's tokens in pixels"
            below = image_size // span * span
            take = f"{below} or {below + span}" if below else f"{span}"
            if backbone and patch_size > 1:
                take += ", or set patch_size to 1 as hybrids such as r50_vit_b16 have it"
            raise UserError(f"image_size {image_size} is not divisible by {by}; take {take}")
        _check_heads("embed_dim", embed_dim, "num_heads", num_heads)
        choices: list[tuple[str, str, Iterable[str]]] = [
            ("gelu", gelu, ("tanh", "exact")),
            ("pooling", pooling, POOLINGS),
        ]
        choices += [("patch_target", patch_target, PATCH_TARGETS)] if patch_target is not None else []
        for name, value, known in choices:
            if value not in known:
                raise UserError(f"unknown {name}: {value!r}; take one of {', '.join(known)}")

        if patch_target is not None and pooling == "map":
            raise UserError("pooling 'map' has nothing to do in masked patch prediction; set it to 'cls' or 'mean'")

        if decoder_depth:
            _check_heads("decoder_dim", decoder_dim, "decoder_heads", decoder_heads)
            for setting, chosen, fits in (
                ("backbone", backbone, backbone is None),  # sees into the masked patches
                ("pooling", pooling, pooling != "map"),
                ("position", position, position != "relative"),  # is of a whole grid
                ("position_at", position_at, position_at == "stem"),
            ):
                if not fits:
                    raise UserError(f"masked autoencoding does not go with {setting} {chosen!r}; leave it out")

        self.image_size, self.patch_size, self.embed_dim = image_size, patch_size, embed_dim
        self.depth, self.num_heads, self.mlp_dim = depth, num_heads, mlp_dim
        self.num_classes, self.pooling, self.representation = num_classes, pooling, representation
        self.position, self.position_at, self.registers = position, position_at, registers
        self.qkv_bias, self.norm_eps, self.gelu = qkv_bias, norm_eps, gelu
        self.drop_path, self.head_bias = drop_path, head_bias
        self.backbone, self.backbone_width, self.patch_target = backbone, backbone_width, patch_target
        self.decoder_depth, self.decoder_dim, self.decoder_heads = decoder_depth, decoder_dim, decoder_heads
        self.grid = image_size // span
        self.positions = Positions(position, position_at, self.grid, embed_dim, pooling == "cls", registers)

        # ---- tokens
        self.patch_embed = (
            PatchEmbed(patch_size, embed_dim)
            if backbone is None
            else HybridPatchEmbed(backbone, backbone_width, patch_size, embed_dim)
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if pooling == "cls" else None
        self.reg_token = nn.Parameter(torch.empty(1, registers, embed_dim)) if registers else None
        # The table of the first block's input is the model's, as in timm; relative positions are inside the blocks.
        blocks_own = [position_at == "every" and (position == "relative" or i > 0) for i in range(depth)]
        if position in FIXED:
            self.register_buffer("pos_embed", self.positions.sincos(), persistent=False)
        elif position == "none" or blocks_own[0]:
            self.pos_embed = None
        else:
            learned = self.positions.empty()
            assert learned is not None  # what is left are the kinds that have some
            self.pos_embed = nn.Parameter(learned)
        # Registers must differ from each other, which nothing else makes them.
        begin = {"pos_embed": 0.02, "reg_token": 1e-6}
        self.begin = {"cls_token": zeros} | {name: partial(normal, std=std) for name, std in begin.items()}
        self.dropout = nn.Dropout(dropout)

        # ---- blocks
        self.blocks = nn.ModuleList(
            self.new_block(
                i, embed_dim, num_heads, mlp_dim, gelu, dropout, drop_path * i / max(depth - 1, 1), qkv_bias,
                norm_eps, self.positions, blocks_own[i],
            )
            for i in range(depth)
        )  # fmt: skip
        self.norm = LayerNorm(embed_dim, norm_eps)

        # ---- head
        self.attn_pool = AttentionPool(embed_dim, num_heads, mlp_dim, gelu, norm_eps) if pooling == "map" else None
        self.pre_logits = (
            nn.Sequential(OrderedDict(fc=Linear(embed_dim, embed_dim, weight=lecun_normal), act=nn.Tanh()))
            if representation
            else nn.Identity()
        )
        self.head = (
            Linear(embed_dim, num_classes, weight=zeros, bias=head_fill(head_bias, num_classes))
            if num_classes
            else nn.Identity()
        )

        # ---- masked patch prediction
        if patch_target is not None:
            self.mask_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.begin["mask_token"] = partial(normal, std=0.02)
            outputs = PATCH_TARGETS[patch_target](3 * span**2)
            self.patch_head = Linear(embed_dim, outputs, weight=lecun_normal)

        # ---- masked autoencoding
        if decoder_depth:
            positions = Positions("sincos_2d_moco", "stem", self.grid, decoder_dim, pooling == "cls", 0)
            block = (decoder_dim, decoder_heads, 4 * decoder_dim, gelu, 0.0, 0.0, qkv_bias, norm_eps, positions, False)
            self.decoder = Decoder(embed_dim, positions, [Block(*block) for _ in range(decoder_depth)], 3 * span**2)

    def new_block(self, i: int, *arguments: Any) -> Block:
        """Return block ``i``."""
        return Block(*arguments)

    def forward(
        self,
        images: Tensor,
        draws: Tensor | None = None,
        corruption: Tensor | None = None,
        visible: Tensor | None = None,
        features: bool = False,
        positions_first: bool = False,
    ) -> Tensor:
        """Return the logits, or with ``features`` these; with ``corruption`` or ``visible`` what is told of patches.

        Args:
            images: float [n, 3, image_size, image_size].
            draws: float [n, depth, 2] uniform in [0, 1): the stochastic-depth draws of each sample, for its
                attention and MLP branches, so that a sample's draws need not depend on its rank or batch.
                Left out, a model in training mode draws its own.
            corruption: int64 [n, m, 2]: the corrupted patches of each image, and the patch whose embedding each gets,
                of this image or of another, ``MASK``, or ``UNTOLD``, as pipeline/corruption.py has it. Of a model with
                a ``patch_target``.
            visible: int64 [n, v]: the patches of each image that are seen. Of a model with a decoder.
            positions_first: corrupt patches that have their position embeddings: a masked one does not know its place.
            features: return what the head sees. Under ZeRO-3 ``forward`` alone gathers the weights that this needs.

        Returns:
            [n, K]; with ``features`` or without a head [n, D]; with ``corruption`` [n, m, outputs]; with ``visible``
            the pixels of all patches, [n, N, 3 P P].
        """
        if visible is not None:
            return self.decoder(self.tokens(images, draws, visible=visible), visible)
        if corruption is None:
            x = self.features(images, draws)
            return x if features else self.head(x)
        x = self.tokens(images, draws, corruption, positions_first=positions_first)
        x = x[:, self.positions.class_token :]  # [n, N, D]
        where = corruption[:, :, :1].expand(-1, -1, x.shape[2])
        return self.patch_head(x.gather(1, where))

    def features(self, images: Tensor, draws: Tensor | None = None) -> Tensor:
        """Return what the head sees, [n, D]: the tanh layer's output, or without one the pooled tokens.

        Arguments as in ``forward``. Under ZeRO-3 only ``forward`` gathers the weights that this needs.
        """
        x = self.tokens(images, draws)  # [n, T - R, D]
        if self.attn_pool is not None:
            return self.pre_logits(self.attn_pool(x))
        return self.pre_logits(x.mean(dim=1) if self.pooling == "mean" else x[:, 0])

    def tokens(
        self,
        images: Tensor,
        draws: Tensor | None = None,
        corruption: Tensor | None = None,
        visible: Tensor | None = None,
        positions_first: bool = False,
    ) -> Tensor:
        """Return the normed tokens, [n, T - R, D]: a class token if there is one, then the patches that are seen.

        Arguments as in ``forward``.
        """
        x = self.patch_embed(images)  # [n, N, D]
        if corruption is not None and not positions_first:
            x = self._corrupted(x, corruption)
        parts = [token for token in (self.cls_token, x, self.reg_token) if token is not None]
        x = torch.cat([token.expand(len(x), -1, -1) for token in parts], dim=1)  # [n, T, D]
        x = x.to(self.norm.weight.dtype)  # autocast leaves the residuals in full precision
        positions: Tensor | None = self.pos_embed  # keys of offsets, or what is added to the tokens
        if positions is not None and self.position != "relative":
            positions = self.positions.table(positions)
            x = x + positions
        if corruption is not None and positions_first:
            cls, x, registers = self._split(x)
            x = torch.cat([cls, self._corrupted(x, corruption), registers], dim=1)
        if visible is not None:
            x = self._seen(x, visible)
        x = self.dropout(x)
        if not self.training or self.drop_path == 0:
            draws = None
        elif draws is None:
            draws = torch.rand(len(x), len(self.blocks), 2, device=x.device)
        for i, block in enumerate(self.blocks):
            # What is added has been, before the first block.
            shared = positions if self.position_at == "shared" and (i > 0 or self.position == "relative") else None
            x = block(x, None if draws is None else draws[:, i], shared)
        return self.norm(x[:, : x.shape[1] - self.registers])

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the class token or none, the patches and the registers of tokens [n, T, D]."""
        return x.split([int(self.positions.class_token), self.grid**2, self.registers], dim=1)

    def _seen(self, x: Tensor, visible: Tensor) -> Tensor:
        """Return the tokens [n, T, D] without the patches that are not ``visible`` [n, v]."""
        cls, x, registers = self._split(x)
        x = x.gather(1, visible[:, :, None].expand(-1, -1, x.shape[2]))
        return torch.cat([cls, x, registers], dim=1)

    def _corrupted(self, x: Tensor, corruption: Tensor) -> Tensor:
        """Return patch embeddings [n, N, D], those that are told of [n, m, 2] replaced."""
        n, patches, width = x.shape
        where, source = corruption.unbind(2)
        taken = torch.where(source < 0, where, source)  # of those that take none from elsewhere, their own
        following = torch.arange(n, device=x.device)[:, None] * patches + taken  # [n, m], in a circle
        others = x.flatten(0, 1).index_select(0, following.flatten() % (n * patches)).view(n, -1, width)
        where, source = (each[:, :, None].expand(-1, -1, width) for each in (where, source))
        instead = torch.where(source == MASK, self.mask_token.to(x.dtype), others)
        return x.scatter(1, where, instead)


MOST_HEADS = 4096
"""That an error looks among for a number that fits: a width may be any number that stands in a file."""


def _check_heads(of: str, width: int, name: str, heads: int) -> None:
    if width % heads:
        divisors = [each for each in range(1, min(width, MOST_HEADS) + 1) if width % each == 0]
        near = [max(d for d in divisors if d < heads), *(d for d in divisors if d > heads)][:2]
        raise UserError(f"{of} {width} is not divisible by {name} {heads}; take {' or '.join(map(str, near))}")
