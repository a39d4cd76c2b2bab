"""What a model costs: parameters, and arithmetic by the paper's count, on no memory at all."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.corruption import corrupted_patches
from pipeline.masking import visible_count
from pipeline.models import create_model
from pipeline.models.vit import VisionTransformer

BACKWARD = 2
"""Backward passes cost twice the forward pass: a product for the gradient of each of the two factors."""


class Cost(NamedTuple):
    """What a model costs.

    Attributes:
        parameters: All of them, the head's among them.
        macs: Multiply-adds of the forward pass of one image, of convolutions and matrix products alone.
    """

    parameters: int
    macs: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the forward pass of one image: a multiply-add is two."""
        return 2 * self.macs

    def training_flops(self, samples: int) -> int:
        """Return the operations of training on so many samples, as the paper counts them (its Table 6)."""
        return (1 + BACKWARD) * self.flops * samples


def cost_of(name: str, *, hidden: float = 0.5, **settings: Any) -> Cost:
    """Return what ``create_model(name, **settings)`` costs; ``hidden`` is the share of patches that it has to tell.

    The forward pass is run on the meta device, where tensors are shapes alone, and the products in it are counted: so
    it holds for every model, whatever is set.

    Raises:
        UserError: An unknown model or setting, or settings that do not fit each other.
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = create_model(name, **settings, seed=None).eval()
        images = torch.empty(1, 3, model.image_size, model.image_size)
        drawn: dict[str, Tensor] = {}
        if settings.get("patch_target") is not None:
            assert isinstance(model, VisionTransformer)  # no other takes that setting
            drawn["corruption"] = torch.empty(1, corrupted_patches(model.grid**2, hidden), 2, dtype=torch.int64)
        if settings.get("decoder_depth"):
            assert isinstance(model, VisionTransformer)
            drawn["visible"] = torch.empty(1, visible_count(model.grid**2, hidden), dtype=torch.int64)
        model(images, **drawn)
    return Cost(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)
