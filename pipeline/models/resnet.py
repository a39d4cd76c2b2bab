"""The ResNet that the paper compares with, "ResNet (BiT)", with the parameter names of timm.

A ResNet-v2 of bottleneck units: the norm and the activation come before each convolution, GroupNorm stands in the place
of BatchNorm, and the weights of every convolution but the head's are standardised.
Source: "Big Transfer (BiT)" (arXiv 1912.11370) and its code at google-research/big_transfer; first values as in
google-research/big_vision, models/bit_paper.py. It is another ResNet than that of the hybrids: see hybrid.py.

Legend of the shape comments: n images, H x W pixels, C channels, K classes.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pipeline.models.layers import Conv2d, head_fill, lecun_normal, ones, zeros
from shards.errors import UserError

DEPTHS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3], 200: [3, 24, 36, 3]}
SIZES = [(50, 1), (50, 2), (50, 3), (101, 1), (101, 3), (152, 1), (152, 2), (152, 4), (200, 3)]
SETTINGS: dict[str, dict[str, Any]] = {
    f"bit_r{depth}x{wide}": {"units": DEPTHS[depth], "width": 64 * wide} for depth, wide in SIZES
}

GROUPS = 32
EXPANSION = 4  # a unit gives this many times the channels that it works with inside


class StdConv2d(Conv2d):
    """A convolution without bias whose filters are brought to mean 0 and variance 1 before they are used."""

    def __init__(self, channels_in: int, channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        settings = {"stride": stride, "padding": padding}
        super().__init__(channels_in, channels, kernel_size, weight=lecun_normal, bias=None, **settings)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to [n, C', H', W']."""
        # (w - mean) / sqrt(var + 1e-10) over each filter: a layer norm without gains, and so one kernel.
        weight = F.layer_norm(self.weight, self.weight.shape[1:], eps=1e-10)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class GroupNormRelu(nn.GroupNorm):
    """GroupNorm of 32 groups, with a ReLU after it."""

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels, eps=1e-5)
        self.begin = {"weight": ones, "bias": zeros}

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, C, H, W] to the same shape, nothing below 0."""
        return F.relu(super().forward(x), inplace=True)


class Unit(nn.Module):
    """A bottleneck that gets its input before norm and activation; the 3x3 convolution has the stride."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        out = EXPANSION * channels
        self.norm1 = GroupNormRelu(channels_in)
        self.conv1 = StdConv2d(channels_in, channels, 1)
        self.norm2 = GroupNormRelu(channels)
        self.conv2 = StdConv2d(channels, channels, 3, stride=stride, padding=1)
        self.norm3 = GroupNormRelu(channels)
        self.conv3 = StdConv2d(channels, out, 1)
        self.downsample = None
        if stride != 1 or channels_in != out:
            self.downsample = nn.Sequential(OrderedDict(conv=StdConv2d(channels_in, out, 1, stride=stride)))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels_in, H, W] to [n, 4 * channels, H / stride, W / stride]."""
        y = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(self.norm2(y))
        y = self.conv3(self.norm3(y))
        return shortcut + y


class ResNet(nn.Module):
    """The ResNet of BiT: root, stages of pre-activation units, norm, mean over the image, linear head.

    The constructor does not write values: use ``create_model``, ``init_parameters`` or load a state. Images of any
    size go through the same parameters.

    Args:
        units: units of each stage; all stages but the first halve the sides of the image.
        width: channels inside the units of the first stage, a multiple of 32; each stage doubles it (x1 is 64).
        image_size: side of the square images that it is trained with, in pixels.
        num_classes: outputs of the head; 0 means no head.
        head_bias: first value of the head's bias, or "log_prior", which is -ln K.

    Raises:
        UserError: numbers that cannot be.
    """

    drop_path = 0.0  # stochastic depth is not part of this model
    blocks: tuple[nn.Module, ...] = ()  # nor are blocks that it would be of

    def __init__(
        self,
        *,
        units: list[int],
        width: int,
        image_size: int = 224,
        num_classes: int = 1000,
        head_bias: float | str = 0.0,
    ):
        super().__init__()
        check_units(units)
        if not units:
            raise UserError("units is empty: []; give the units of at least one stage")
        if width < 1 or width % GROUPS:
            raise UserError(f"width {width} is no multiple of {GROUPS}, the groups of its norms; take 64 for x1")
        if image_size < 1:
            raise UserError(f"image_size is too small: {image_size}; give at least 1")
        if num_classes < 0:
            raise UserError(f"num_classes is negative: {num_classes}; give 0 for no head")
        self.units, self.width, self.image_size = list(units), width, image_size
        self.num_classes, self.head_bias = num_classes, head_bias
        self.embed_dim = EXPANSION * width * 2 ** (len(units) - 1)

        # A border of zeros before the pooling is not the pooling's own padding: what comes here may be negative.
        self.stem = nn.Sequential(
            OrderedDict(
                conv=StdConv2d(3, width, 7, stride=2, padding=3),
                pad=nn.ConstantPad2d(1, 0.0),
                pool=nn.MaxPool2d(3, stride=2),
            )
        )
        self.stages = stages(Unit, units, width)
        self.norm = GroupNormRelu(self.embed_dim)
        self.head: nn.Module = nn.Identity()
        if num_classes:
            fc = Conv2d(self.embed_dim, num_classes, 1, weight=zeros, bias=head_fill(head_bias, num_classes))
            self.head = nn.Sequential(OrderedDict(fc=fc, flatten=nn.Flatten(1)))

    def forward(self, images: Tensor, draws: Tensor | None = None, features: bool = False) -> Tensor:
        """Return the logits [n, K] of images, float [n, 3, H, W]; without a head, or on request, the features.

        ``draws`` is there for the models that have stochastic depth, and is not used.
        """
        x = self.features(images)
        return x if features or not self.num_classes else self.head(x[:, :, None, None])

    def features(self, images: Tensor) -> Tensor:
        """Return what the head sees, [n, embed_dim]: the mean over the image of the last norm's output."""
        return self.norm(self.stages(self.stem(images))).mean((2, 3))


def stages(unit: Callable[[int, int, int], nn.Module], units: list[int], width: int) -> nn.Sequential:
    """Return the stages of a ResNet: ``units[s]`` units in stage s, which works with ``width * 2**s`` channels.

    Args:
        unit: makes a unit of (channels that come in, channels inside, stride).
        units: units of each stage.
        width: channels that come in, and channels inside the first stage.
    """
    made, channels_in = [], width
    for s, count in enumerate(units):
        channels, blocks = width * 2**s, []
        for u in range(count):
            blocks.append(unit(channels_in, channels, 2 if s > 0 and u == 0 else 1))
            channels_in = EXPANSION * channels
        made.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(*blocks))))
    return nn.Sequential(*made)


def check_units(units: list[int]) -> None:
    """Raise a UserError where a stage has no unit."""
    if any(count < 1 for count in units):
        raise UserError(f"a stage has no unit: {list(units)}; give each at least 1")
