"""Masked autoencoding (MAE, arXiv 2111.06377): from a quarter of an image's patches tell the pixels of the others.

The encoder sees the visible patches alone; a small decoder, which is thrown away after, tells the masked ones. Each
patch's pixels are normed by its own mean and deviation. What the paper gives as a share is an exact count here.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.evaluate.held_out import mean_over
from pipeline.images import to_model_input
from pipeline.masking import visible_patches
from pipeline.models.vit import VisionTransformer
from shards.augment import TRANSFORMS
from shards.batch import Batch
from shards.dataset import Dataset
from shards.evaluation import EvaluationBatch

VARIANCE_FLOOR = 1e-6  # of a patch of one colour


class MaskedAutoencoding:
    """The objective of a stage of kind ``mae``.

    Args:
        settings: Of the stage.
        template: The model, on any device; its values are not read.
        epoch: Samples of an epoch; None: nobody knows.
    """

    def __init__(self, settings: TrainSettings, template: VisionTransformer, epoch: int | None):
        self._settings, self._epoch, self._grid = settings, epoch, template.grid

    def prepare(self, batch: Batch | EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return images, float32 [n, 3, H, W] in [-1, 1], and the visible patches, int64 [n, v], on the device."""
        device, share = distributed.device(), self._settings.mae.share
        visible = visible_patches(batch.positions, self._epoch, self._settings.seed, self._grid**2, share)
        return to_model_input(batch.images, device), torch.from_numpy(visible).to(device)

    def loss(self, model: Callable[..., Tensor], images: Tensor, visible: Tensor) -> Tensor:
        """Return the mean squared error of what ``model(images, visible=visible)`` tells of the masked patches."""
        return self._losses(model, images, visible).mean()

    def evaluate(self, model: Callable[..., Tensor], dataset: Dataset) -> dict[str, float]:
        """Return ``loss`` and ``images``; collective over all ranks. An image's mask is always the same."""
        data, evaluate = self._settings.data, self._settings.evaluate

        def measure(images: Tensor, visible: Tensor) -> Tensor:
            return self._losses(model, images, visible)[:, None]

        transform = TRANSFORMS[evaluate.view](data.resolution)
        (loss,), images = mean_over(dataset, transform, evaluate.batch, data.threads, self.prepare, measure)
        return {"loss": loss, "images": images}

    @staticmethod
    def better(val: dict[str, float], best: dict[str, float]) -> bool:
        """Tell whether one evaluation beats another."""
        return val["loss"] < best["loss"]

    def _losses(self, model: Callable[..., Tensor], images: Tensor, visible: Tensor) -> Tensor:
        """Return the loss of each image, [n]."""
        told = model(images, visible=visible).float()  # [n, N, 3*P*P]
        errors = (told - pixel_targets(images, self._grid, self._settings.mae.norm_pixels)).square().mean(dim=2)
        masked = torch.ones_like(errors).scatter(1, visible, 0.0)  # [n, N]
        return (errors * masked).sum(dim=1) / masked.sum(dim=1)


def pixel_targets(images: Tensor, grid: int, norm: bool) -> Tensor:
    """Return the pixels of each patch, [n, g*g, P*P*3]: row by row, the colours of a pixel together.

    Args:
        images: float32 [n, 3, H, W].
        grid: patches g along a side.
        norm: to mean 0 and variance 1 over all values of a patch.
    """
    side = images.shape[2] // grid
    patches = images.unflatten(3, (grid, side)).unflatten(2, (grid, side))  # [n, 3, g, P, g, P]
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(images), grid**2, -1)
    if not norm:
        return patches
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    return (patches - mean) / (variance + VARIANCE_FLOOR).sqrt()
