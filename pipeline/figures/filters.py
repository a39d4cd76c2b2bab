"""The filters that patches are embedded with, by their principal components (paper, figure 7 left)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipeline.figures.canvas import tiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPONENTS = 28  # as many as the paper shows


def patch_filters(model: nn.Module) -> Tensor:
    """Return the weights [D, 3, P, P] of the layer that sees the pixels: of a ViT its patches, of others their root."""
    return next(each.weight for each in model.modules() if isinstance(each, nn.Conv2d) and each.in_channels == 3)


def principal_components(filters: Tensor, count: int = COMPONENTS) -> tuple[Tensor, Tensor]:
    """Return the first principal components of filters as pictures, and the share of the variance of each.

    What the paper leaves open: filters are centred, a component points where its greatest value is positive, and each
    is stretched to [0, 1] by itself.

    Args:
        filters: [D, 3, P, P].
        count: At most; there are no more than filters or values.

    Returns:
        float64 [count, P, P, 3] in [0, 1]; float64 [count].
    """
    rows = filters.detach().double().cpu().flatten(1)  # [D, 3*P*P]
    _, sizes, components = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    shares, components = sizes.square() / sizes.square().sum(), components[:count]
    greatest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = components * greatest.sign()
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    pictures = (components - low) / (high - low).clamp(min=1e-12)
    return pictures.unflatten(1, filters.shape[1:]).permute(0, 2, 3, 1), shares[:count]


def draw(model: nn.Module) -> "Figure":
    """Draw the components, seven to a row."""
    filters = patch_filters(model)
    pictures, shares = principal_components(filters)
    title = (
        f"{len(pictures)} principal components of {len(filters)} filters: {100 * shares.sum():.0f} % of the variance"
    )
    return tiles(pictures.numpy(), 7, 0.8, title, interpolation="nearest")
