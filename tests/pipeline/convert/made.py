"""Tiny models with random values, as weights files."""

from pathlib import Path
from typing import Any

import torch

from pipeline.models import create_model
from pipeline.weights import write_weights

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}
# Of no number of values that 2 ranks could share evenly.
ODD = {"name": "vit_ti16", "image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
ODD |= {"num_classes": 5, "mlp_dim": 31}


def randomized(**model) -> torch.nn.Module:
    """Return a model in evaluation mode whose every parameter is random, so that none is without effect."""
    made = create_model(**model).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            gain = "norm" in name and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.2, generator=generator)
    return made


def save(made: torch.nn.Module, path: Path, model: dict[str, Any], classes: list[str] | None = None) -> Path:
    """Write a model as ``patchmill convert`` does."""
    names = [f"class {i}" for i in range(made.num_classes)] if classes is None else classes
    write_weights(path, dict(made.state_dict()), {"model": model, "classes": names})
    return path
