"""Objectives, one file each: what a batch is to a model, the loss of a step, and how good the model is by it."""

from torch import nn

from pipeline.config import TrainSettings
from pipeline.objectives.mae import MaskedAutoencoding
from pipeline.objectives.masked_patch import MaskedPatch
from pipeline.objectives.supervised import Supervised


def create_objective(
    settings: TrainSettings, template: nn.Module, epoch: int | None, num_classes: int
) -> Supervised | MaskedPatch | MaskedAutoencoding:
    """Return the objective of a stage, whose model is like ``template``."""
    if settings.kind == "masked_patch":
        return MaskedPatch(settings, template, epoch)
    if settings.kind == "mae":
        return MaskedAutoencoding(settings, template, epoch)
    return Supervised(settings, epoch, num_classes)
