"""What a model that was trained to tell hidden patches makes of images: masked patch prediction, and MAE."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.corruption import corruption
from pipeline.figures.canvas import tiles
from pipeline.masking import visible_patches
from pipeline.models.vit import BINS, VisionTransformer
from pipeline.objectives.mae import VARIANCE_FLOOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = 0.0  # of [-1, 1]


def tells_patches(model: torch.nn.Module) -> bool:
    """Tell whether a model has what it tells hidden patches with."""
    return bool(getattr(model, "patch_target", None) or getattr(model, "decoder_depth", 0))


@torch.no_grad()
def reconstruct(model: VisionTransformer, images: Tensor, norm_pixels: bool = True) -> tuple[Tensor, Tensor]:
    """Return images whose hidden patches are grey, and with what the model tells in their place; both [n, 3, H, W].

    In masked patch prediction half of the patches are hidden, all by the mask embedding; of MAE three quarters.

    Args:
        model: With a ``patch_target`` or a decoder.
        images: float32 [n, 3, H, W] in [-1, 1].
        norm_pixels: Of MAE: it tells pixels normed by each patch's mean and deviation, which are then taken from it.
    """
    positions, patches = np.arange(len(images)), model.grid**2
    span = model.image_size // model.grid
    own = to_patches(images, model.grid)  # [n, N, 3, P, P]
    if model.patch_target:
        drawn = torch.from_numpy(corruption(positions, None, 0, patches, 0.5, 1.0, 0.0)).to(images.device)
        hidden = drawn[:, :, 0]  # [n, m]
        told = _told_patches(model.patch_target, model(images, corruption=drawn).float(), span)  # [n, m, 3, P, P]
    else:
        seen = torch.from_numpy(visible_patches(positions, None, 0, patches, 0.75)).to(images.device)
        covered = torch.ones(len(images), patches, dtype=torch.bool, device=images.device).scatter(1, seen, False)
        hidden = covered.nonzero()[:, 1].view(len(images), -1)
        told = model(images, visible=seen).float().unflatten(2, (span, span, 3)).permute(0, 1, 4, 2, 3)
        if norm_pixels:
            variance, mean = torch.var_mean(own.flatten(2), dim=2)
            told = told * (variance + VARIANCE_FLOOR).sqrt()[:, :, None, None, None] + mean[:, :, None, None, None]
        told = told.gather(1, _spread(hidden, own))
    where = _spread(hidden, own)
    return (
        from_patches(own.scatter(1, where, GREY), model.grid),
        from_patches(own.scatter(1, where, told), model.grid).clamp(-1, 1),
    )


def to_patches(images: Tensor, grid: int) -> Tensor:
    """Cut images [n, 3, g*P, g*P] into patches [n, g*g, 3, P, P], row by row."""
    cut = images.unflatten(3, (grid, -1)).unflatten(2, (grid, -1))  # [n, 3, g, P, g, P]
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def from_patches(patches: Tensor, grid: int) -> Tensor:
    """Put patches [n, g*g, 3, P, P] together to images [n, 3, g*P, g*P]."""
    return patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _told_patches(target: str, told: Tensor, span: int) -> Tensor:
    """Return as patches [n, m, 3, P, P] what a head tells of them, [n, m, outputs]: colours are their bins' middles."""
    if target == "pixels":
        return told.unflatten(2, (3, span, span))
    parts = 1 if target == "mean_color" else 4
    colors = told.unflatten(2, (parts**2, BINS**3)).argmax(dim=3)  # [n, m, parts*parts]
    digits = torch.stack([colors // BINS**2, colors // BINS % BINS, colors % BINS], dim=2)  # [n, m, 3, parts*parts]
    values = ((digits + 0.5) * (256 / BINS) - 0.5) / 127.5 - 1
    at = torch.arange(span, device=told.device) * parts // span  # which part a pixel is in
    return values.unflatten(3, (parts, parts))[:, :, :, at][..., at]


def _spread(places: Tensor, patches: Tensor) -> Tensor:
    return places[:, :, None, None, None].expand(-1, -1, *patches.shape[2:])


def draw(model: VisionTransformer, images: Tensor, norm_pixels: bool = True) -> "Figure":
    """Draw images, what the model sees of them, and what it tells, six to a row."""
    hidden, told = reconstruct(model, images, norm_pixels)
    pictures = torch.stack([images, hidden, told], dim=1).flatten(0, 1).cpu()  # [3 n, 3, H, W]
    pixels = ((pictures.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    return tiles(pixels, 6, 1.2, "images, what the model sees of them, and what it tells", interpolation="nearest")
