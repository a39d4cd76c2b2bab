"""From stored images to what a model sees: the transform that settings name, and pixels as floats."""

import sys

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name everyone knows)
from torch import Tensor

from pipeline.config import TrainSettings
from pipeline.datasettings import DataSettings
from pipeline.losses import class_targets
from shards.augment import TRANSFORMS, InceptionCrop, ResizeCrop, Transform
from shards.augreg import PRESETS
from shards.batch import Batch
from shards.mixup import mixup_weights, partner_rows
from shards.randaugment import RandAugment


def training_transform(data: DataSettings) -> Transform:
    """Return the augmentation of a training stage, without mixup."""
    crop = InceptionCrop(data.resolution, data.crop_area, shrink=data.scaled_decoding, mirror=data.mirror)
    if data.augment in PRESETS:
        return RandAugment(crop, PRESETS[data.augment].layers, PRESETS[data.augment].magnitude)
    if data.augment == "resize_crop":
        return ResizeCrop(data.resolution, data.resize, data.mirror)
    return crop if data.augment == "inception" else TRANSFORMS[data.augment](data.resolution)


def to_model_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Turn uint8 [n, H, W, 3] into float32 [n, 3, H, W] in [-1, 1] (vit-paper 8), on the device."""
    if device.type == "cpu":  # by this thread alone: torch's would spin while they wait for cores that decode images
        floats = images.astype(np.float32)
        floats /= np.float32(127.5)
        floats -= np.float32(1)
        return torch.from_numpy(floats).permute(0, 3, 1, 2)
    pixels = torch.from_numpy(images).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def training_input(
    batch: Batch, settings: TrainSettings, epoch_samples: int | None, num_classes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Bring a rank's share of a global batch to the device, and mix each row with its partner's if settings say so.

    Mixing is done here, not in the loader: floats mix without rounding, and the device has time for it.

    Args:
        batch: Of host memory.
        settings: Of the stage.
        epoch_samples: Samples of an epoch; None: it never ends.
        num_classes: Of the labels.
        device: Of the model.

    Returns:
        images, float32 [n, 3, H, W] in [-1, 1], and class indices, int64 [n], or with mixup or several labels an image
        the classes' shares, float32 [n, num_classes].
    """
    images = to_model_input(batch.images, device)
    labels = class_targets(batch, num_classes, settings.loss, device)
    if not settings.data.mixup_alpha:
        return images, labels
    weights = mixup_weights(batch.positions, epoch_samples or sys.maxsize, settings.seed, settings.data.mixup_alpha)
    keep = torch.from_numpy(weights).to(device)
    partner = torch.from_numpy(partner_rows(len(labels))).to(device)
    shares = labels if labels.is_floating_point() else F.one_hot(labels, num_classes).float()
    return (
        torch.lerp(images[partner], images, keep[:, None, None, None]),
        torch.lerp(shares[partner], shares, keep[:, None]),
    )
