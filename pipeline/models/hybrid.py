"""The ResNet before the Vision Transformer of a hybrid, with the parameter names of timm.

Another ResNet than BiT's (resnet.py), as in google-research/vision_transformer, models_resnet.py: norms and
activations come after the convolutions (ResNet-v1), the norm of a unit's last convolution begins with gain 0, weights
are standardised with epsilon outside of the root, GroupNorm has epsilon 1e-6, and padding is TensorFlow's SAME.

Legend of the shape comments: n images, H x W pixels, C channels, g x g patches, D width of the tokens.
"""

from collections import OrderedDict

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.models.layers import Conv2d, Fill, lecun_normal, ones, zeros
from pipeline.models.resnet import EXPANSION, GROUPS, check_units, stages
from shards.errors import UserError


def pad_same(x: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Pad [n, C, H, W] with zeros as TensorFlow's SAME does: an odd pixel goes to the bottom and to the right."""
    sides = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


class StdConv2d(Conv2d):
    """A convolution without bias, with standardised filters and SAME padding."""

    def __init__(self, channels_in: int, channels: int, kernel_size: int, stride: int = 1):
        super().__init__(channels_in, channels, kernel_size, weight=lecun_normal, bias=None, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C', H / stride, W / stride], rounded up."""
        # (w - mean) / (std + 1e-5) over each filter: a norm whose groups are the filters takes half the time that the
        # operations one by one would. Its gains take back its own epsilon, there for filters without any deviation.
        filters = self.weight.flatten(1)  # [C', C * k * k]
        std = filters.std(1, correction=0)
        gain = (std.square() + 1e-10).sqrt() / (std + 1e-5)
        weight = F.group_norm(filters[None], len(filters), gain, eps=1e-10).view_as(self.weight)
        size, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, weight, padding=size // 2)
        return F.conv2d(pad_same(x, size, stride), weight, stride=stride)


class GroupNorm(nn.GroupNorm):
    """GroupNorm of 32 groups with flax's epsilon."""

    def __init__(self, channels: int, weight: Fill = ones):
        super().__init__(GROUPS, channels, eps=1e-6)
        self.begin = {"weight": weight, "bias": zeros}


class Stem(nn.Module):
    """The root: a quarter of the image's sides, ``width`` channels."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = StdConv2d(3, width, 7, stride=2)
        self.norm = GroupNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, 3, H, W] to [n, width, H / 4, W / 4]."""
        x = F.relu(self.norm(self.conv(images)), inplace=True)
        return F.max_pool2d(pad_same(x, 3, 2), 3, stride=2)  # nothing is below 0, so zeros pad as -infinity would


class Unit(nn.Module):
    """A bottleneck with norm and activation after each convolution; the 3x3 convolution has the stride."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        out = EXPANSION * channels
        self.conv1 = StdConv2d(channels_in, channels, 1)
        self.norm1 = GroupNorm(channels)
        self.conv2 = StdConv2d(channels, channels, 3, stride=stride)
        self.norm2 = GroupNorm(channels)
        self.conv3 = StdConv2d(channels, out, 1)
        self.norm3 = GroupNorm(out, weight=zeros)
        self.downsample = None
        if stride != 1 or channels_in != out:
            projection = OrderedDict(conv=StdConv2d(channels_in, out, 1, stride=stride), norm=GroupNorm(out))
            self.downsample = nn.Sequential(projection)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels_in, H, W] to [n, 4 * channels, H / stride, W / stride]."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + y, inplace=True)


class Backbone(nn.Module):
    """Root and stages: the feature map that a hybrid cuts into patches."""

    def __init__(self, units: list[int], width: int):
        super().__init__()
        self.stem = Stem(width)
        self.stages = stages(Unit, units, width)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [n, 3, H, W] to [n, 4 * width * 2**(s-1), H / 2**(s+1), W / 2**(s+1)], s being the stages."""
        return self.stages(self.stem(images))


class HybridPatchEmbed(nn.Module):
    """Cut the feature map of a ResNet into patches and project each.

    Args:
        units: units of each stage of the ResNet; none means the root alone (R+ViT-Ti/16).
        width: channels of the root, a multiple of 32.
        patch_size: side of a patch on the feature map.
        embed_dim: width D of the tokens.

    Raises:
        UserError: numbers that cannot be.
    """

    def __init__(self, units: list[int], width: int, patch_size: int, embed_dim: int):
        super().__init__()
        check_units(units)
        if width < 1 or width % GROUPS:
            raise UserError(f"backbone_width {width} is no multiple of {GROUPS}, the groups of its norms; take 64")
        self.backbone = Backbone(units, width) if units else Stem(width)
        channels = EXPANSION * width * 2 ** (len(units) - 1) if units else width
        self.proj = Conv2d(channels, embed_dim, patch_size, stride=patch_size, weight=lecun_normal)

    def forward(self, images: Tensor) -> Tensor:
        """Turn images [n, 3, H, W] into patch embeddings [n, g*g, D], row by row."""
        return self.proj(self.backbone(images)).flatten(2).transpose(1, 2)  # [n, D, g, g] -> [n, g*g, D]


def downsampling(units: list[int]) -> int:
    """Return how many pixels of the image a pixel of the feature map stands for, along a side."""
    return 4 * 2 ** max(len(units) - 1, 0)
