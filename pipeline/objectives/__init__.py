"""Objectives, one file each: what a batch is to a model, the loss of a step, and how good the model is by it."""

from pipeline.config import TrainSettings
from pipeline.models import Model
from pipeline.models.vit import VisionTransformer
from pipeline.objectives.mae import MaskedAutoencoding
from pipeline.objectives.masked_patch import MaskedPatch
from pipeline.objectives.supervised import Supervised


def create_objective(
    settings: TrainSettings, template: Model, epoch: int | None, num_classes: int
) -> Supervised | MaskedPatch | MaskedAutoencoding:
    """Return the objective of a stage, whose model is like ``template``."""
    if settings.kind == "masked_patch":
        assert isinstance(template, VisionTransformer)  # which its settings are of
        return MaskedPatch(settings, template, epoch)
    if settings.kind == "mae":
        assert isinstance(template, VisionTransformer)
        return MaskedAutoencoding(settings, template, epoch)
    return Supervised(settings, epoch, num_classes)
