"""The figures of a model on a GPU are those of the model on the CPU."""

import pytest
import torch

from pipeline.figures.distance import attention_distances
from pipeline.figures.filters import patch_filters, principal_components
from pipeline.figures.positions import position_similarity, position_table
from pipeline.figures.reconstruction import reconstruct
from pipeline.figures.rollout import rollout
from pipeline.models import create_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SETTINGS = {"name": "vit_ti8", "image_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 0}


def test_every_figure_has_the_same_numbers():
    model = create_model(**SETTINGS, patch_target="pixels", seed=0).eval()
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = []
    for device in ("cpu", "cuda"):
        moved, seen = model.to(device), images.to(device)
        pictures, shares = principal_components(patch_filters(moved))
        found.append([
            pictures, shares, position_similarity(position_table(moved)), rollout(moved, seen),
            torch.from_numpy(attention_distances(moved, seen)), *(each.cpu() for each in reconstruct(moved, seen)),
        ])  # fmt: skip
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)
