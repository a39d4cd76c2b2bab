"""Every parameter of a checkpoint, whole."""

import torch

from pipeline.checkpoint import Checkpoint


def parameters(found: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint by name, each in its shape."""
    return {
        name: found.read("weight", name, 0, torch.Size(shape).numel()).reshape(shape)
        for name, shape in found.shapes.items()
    }
