"""From stored images to what a model sees: the transform that settings name, and pixels as floats."""

import numpy as np
import torch
from torch import Tensor

from pipeline.config import DataSettings
from shards.augment import TRANSFORMS, InceptionCrop, Transform


def training_transform(data: DataSettings) -> Transform:
    """Return the augmentation of a training stage."""
    if data.augment == "inception":
        return InceptionCrop(data.resolution, data.crop_area)
    return TRANSFORMS[data.augment](data.resolution)


def to_model_input(images: np.ndarray, device: torch.device) -> Tensor:
    """Turn uint8 [n, H, W, 3] into float32 [n, 3, H, W] in [-1, 1] (vit-paper 8), on the device."""
    pixels = torch.from_numpy(images).to(device, non_blocking=True)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
