"""Masked patch prediction (paper, section 4.6 and appendix B.1.2): tell what the corrupted patches of an image show.

Half of the patch embeddings are corrupted before the position embeddings are added: 80 % become a learned mask
embedding, 10 % that of a random other patch, 10 % stay as they are. Each corrupted patch's own token then tells its
target. What the paper leaves open is decided here and in corruption.py: bins that split 0 to 255 evenly, red the
highest digit, and, if nothing else is set, exact counts in every image, others of the same image, means over all that
is told.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pipeline import distributed
from pipeline.config import TrainSettings
from pipeline.corruption import UNTOLD, corrupted_patches, corruption
from pipeline.evaluate.held_out import mean_over
from pipeline.images import to_model_input
from pipeline.models.vit import BINS, VisionTransformer
from shards.augment import TRANSFORMS
from shards.batch import Batch
from shards.dataset import Dataset
from shards.errors import UserError
from shards.evaluation import EvaluationBatch


class MaskedPatch:
    """The objective of a stage of kind ``masked_patch``.

    Args:
        settings: Of the stage.
        template: The model, on any device; its values are not read.
        epoch: Samples of an epoch; None: nobody knows.

    Raises:
        UserError: positions to corrupt, where none are added, or in every block; other images, where there are none.
    """

    def __init__(self, settings: TrainSettings, template: VisionTransformer, epoch: int | None):
        assert template.patch_target is not None
        self._settings, self._epoch = settings, epoch
        self._grid, self._target = template.grid, template.patch_target
        masked, patches = settings.masked_patch, self._grid**2
        for name, value, fits in (
            ("position", template.position, template.position not in ("none", "relative")),
            ("position_at", template.position_at, template.position_at == "stem"),  # later blocks would add them again
        ):
            if masked.positions == "first" and not fits:
                raise UserError(
                    f"masked_patch.positions 'first' wants embeddings that are added to patches once, and model.{name} "
                    f"is {value!r}; leave it out, or set model.position = 'learned' and position_at = 'stem'"
                )
        self._images = 1  # that another patch may be of
        if masked.others == "batch":
            self._images = settings.micro_batch or settings.global_batch // distributed.world_size()
            if self._images == 1:
                raise UserError(
                    "masked_patch.others 'batch' takes patches of other images, and a micro_batch has one; make it "
                    "larger, or leave others out"
                )
        told = corrupted_patches(patches, masked.share) if masked.counts == "exact" else masked.share * patches
        self._weight = told if masked.reduction == "sum" else 1

    def prepare(self, batch: Batch | EvaluationBatch) -> tuple[Tensor, Tensor]:
        """Return images, float32 [n, 3, H, W] in [-1, 1], and their corruption, int64 [n, m, 2], on the device."""
        device, masked = distributed.device(), self._settings.masked_patch
        # Held-out images are drawn from each alone: what they come to must depend on no batch.
        images = self._images if isinstance(batch, Batch) else 1
        drawn = corruption(
            batch.positions, self._epoch, self._settings.seed, self._grid**2, masked.share, masked.mask, masked.other,
            masked.counts == "exact", images,
        )  # fmt: skip
        return to_model_input(batch.images, device), torch.from_numpy(drawn).to(device)

    def loss(self, model: Callable[..., Tensor], images: Tensor, drawn: Tensor) -> Tensor:
        """Return the images' mean loss of what ``model(images, corruption=drawn)`` tells of the corrupted patches."""
        return self._loss(*self._told(model, images, drawn), drawn).mean()

    def evaluate(self, model: Callable[..., Tensor], dataset: Dataset) -> dict[str, float]:
        """Return ``loss``, ``images``, and of colours ``top1``, the share told right; collective over all ranks.

        Every image of the data set is corrupted once, always in the same way.
        """
        data, evaluate = self._settings.data, self._settings.evaluate

        def measure(images: Tensor, drawn: Tensor) -> Tensor:
            told, target = self._told(model, images, drawn)
            values = [self._loss(told, target, drawn)]
            if self._target != "pixels":
                values.append(self._mean((told.argmax(dim=3) == target).float(), drawn))
            return torch.stack(values, dim=1)

        transform = TRANSFORMS[evaluate.view](data.resolution)
        means, images = mean_over(dataset, transform, evaluate.batch, data.threads, self.prepare, measure)
        return dict(zip(("loss", "top1"), means, strict=False)) | {"images": images}

    @staticmethod
    def better(val: dict[str, float], best: dict[str, float]) -> bool:
        """Tell whether one evaluation beats another."""
        return val["loss"] < best["loss"]

    def _told(self, model: Callable[..., Tensor], images: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the model tells and what it should: [n, m, 3*P*P] both; or [n, m, c, 512] and [n, m, c]."""
        target = patch_targets(images, self._grid, self._target)  # [n, N, ...]
        target = target.gather(1, drawn[:, :, :1].expand(-1, -1, target.shape[2]))  # [n, m, ...]
        first = self._settings.masked_patch.positions == "first"
        told = model(images, corruption=drawn, positions_first=first).float()
        return (told if self._target == "pixels" else told.unflatten(2, (-1, BINS**3))), target

    def _mean(self, values: Tensor, drawn: Tensor) -> Tensor:
        """Return the mean of each image, [n], of values [n, m, ...] of its corrupted patches.

        Where each patch is drawn for itself, of so many as are expected: else its loss would count by how many others
        are told on its rank.
        """
        if self._settings.masked_patch.counts == "exact":
            return values.flatten(1).mean(dim=1)
        told = drawn[:, :, 1] != UNTOLD  # [n, N]
        return (values.mean(dim=2) * told).sum(dim=1) / (self._settings.masked_patch.share * self._grid**2)

    def _loss(self, told: Tensor, target: Tensor, drawn: Tensor) -> Tensor:
        """Return the loss of each image, [n]."""
        if self._target == "pixels":
            losses = F.mse_loss(told, target, reduction="none")
        else:
            losses = F.cross_entropy(told.flatten(0, 2), target.flatten(), reduction="none").view(target.shape)
        return self._weight * self._mean(losses, drawn)


def patch_targets(images: Tensor, grid: int, target: str) -> Tensor:
    """Return what is to be told of each patch.

    Args:
        images: float [n, 3, H, W] in [-1, 1].
        grid: patches g along a side.
        target: "mean_color", "mean_colors_4x4" or "pixels".

    Returns:
        int64 [n, g*g, 1] or [n, g*g, 16], of 512 colours; or float32 [n, g*g, 3*P*P], the patch, channel by channel.
    """
    n, side = len(images), images.shape[2] // grid
    if target == "pixels":
        patches = images.float().unfold(2, side, side).unfold(3, side, side)  # [n, 3, g, g, P, P]
        return patches.permute(0, 2, 3, 1, 4, 5).reshape(n, grid**2, -1)
    parts = 1 if target == "mean_color" else 4
    means = F.adaptive_avg_pool2d(images.float(), grid * parts)  # [n, 3, g*parts, g*parts]
    # Of the 256 values of a pixel each bin has 32; what is added lets a mean of exactly 32 come out as no less.
    bins = ((means + 1) * (127.5 * BINS / 256) + 1e-5).floor().clamp_(0, BINS - 1).long()
    colors = (bins[:, 0] * BINS + bins[:, 1]) * BINS + bins[:, 2]  # [n, g*parts, g*parts]
    colors = colors.view(n, grid, parts, grid, parts).transpose(2, 3)
    return colors.reshape(n, grid**2, parts**2)
