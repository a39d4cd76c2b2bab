"""What of an image the model's answer comes from: attention, rolled out over all blocks (paper, figures 6 and 14)."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image, ImageFilter
from torch import Tensor

from pipeline.figures.attention import watched
from pipeline.figures.canvas import tiles
from pipeline.models.vit import VisionTransformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Rollout:
    """The product of all blocks' attention (Abnar and Zuidema, arXiv 2005.00928), block after block.

    Weights are averaged over the heads; the identity stands for the residual, as the authors say in their issue 18.
    """

    def __init__(self) -> None:
        self.product: Tensor | None = None  # [n, T, T]: what each token has of each that came in

    def see(self, block: int, weights: Tensor) -> None:
        """Go through a block of weights [n, h, T, T]."""
        mixed = weights.mean(dim=1) + torch.eye(weights.shape[3], device=weights.device)
        mixed = mixed / mixed.sum(dim=2, keepdim=True)
        self.product = mixed if block == 0 or self.product is None else mixed @ self.product


@torch.no_grad()
def rollout(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return how much of each patch is in what the head sees of images [n, 3, H, W]: float32 [n, g, g], sums to 1.

    The head sees the class token; where there is none, all patches alike.
    """
    first, found = int(model.positions.class_token), []
    for image in images.split(1):
        rolled = Rollout()
        with watched(model, rolled.see):
            model(image)
        assert rolled.product is not None  # the model has a block
        patches = slice(first, first + model.grid**2)
        seen = rolled.product[:, :1] if first else rolled.product[:, patches]  # [1, 1 or N, T]
        found.append(seen.mean(dim=1)[:, patches])
    return F.normalize(torch.cat(found), p=1, dim=1).unflatten(1, (model.grid, model.grid)).cpu()


def overlay(pixels: np.ndarray, weights: np.ndarray, span: int) -> np.ndarray:
    """Return an image uint8 [H, W, 3] lit by weights [g, g], as the authors show it (their issue 27)."""
    mask = Image.fromarray((weights / weights.max()).astype(np.float32))
    mask = mask.resize(pixels.shape[1::-1], Image.Resampling.LANCZOS)
    # Blurred by a patch, in 8 bits since Pillow blurs no floats.
    lit = np.asarray(mask).clip(0, 1)
    lit = np.asarray(Image.fromarray((255 * lit).round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(span)))
    lit = (lit - lit.min()) / max(float(np.ptp(lit)), 1.0)
    return (pixels * lit[:, :, None]).round().astype(np.uint8)


def draw(model: VisionTransformer, images: Tensor, pixels: np.ndarray) -> "Figure":
    """Draw pixels uint8 [n, H, W, 3], each image beside itself lit by the attention that the model gives ``images``."""
    weights, span = rollout(model, images).numpy(), model.image_size // model.grid
    pairs = [each for image, mask in zip(pixels, weights, strict=True) for each in (image, overlay(image, mask, span))]
    return tiles(pairs, 4, 1.5, "images, and the attention that the answer comes from")
