import pytest
import torch

from pipeline.figures.reconstruction import from_patches, reconstruct, tells_patches, to_patches
from pipeline.models import create_model
from pipeline.objectives.mae import pixel_targets
from pipeline.objectives.masked_patch import patch_targets

TINY = {"name": "vit_ti8", "image_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 1}
GRID = 4


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def told_right(model, images, monkeypatch, target):
    """Let the model tell exactly what it should, whatever it sees."""

    def forward(seen, corruption=None, visible=None):
        if visible is not None:
            return target(images)
        right = target(images)
        right = right.gather(1, corruption[:, :, :1].expand(-1, -1, right.shape[2]))
        if right.is_floating_point():
            return right
        return torch.nn.functional.one_hot(right, 512).float().flatten(2)

    monkeypatch.setattr(model, "forward", forward)


def test_patches_are_put_together_as_they_were_cut(images):
    patches = to_patches(images, GRID)
    assert patches.shape == (3, 16, 3, 8, 8)
    assert torch.equal(patches[1, 6], images[1, :, 8:16, 16:24])
    assert torch.equal(from_patches(patches, GRID), images)


@pytest.mark.parametrize("target", ["mean_color", "mean_colors_4x4", "pixels"])
def test_what_is_told_right_is_shown_right(images, monkeypatch, target):
    model = create_model(**TINY, patch_target=target, pooling="cls", num_classes=0, seed=0).eval()
    told_right(model, images, monkeypatch, lambda pictures: patch_targets(pictures, GRID, target))
    hidden, told = reconstruct(model, images)
    covered = (to_patches(hidden, GRID) == 0).flatten(2).all(2)
    assert covered.sum(1).tolist() == [8, 8, 8]
    assert torch.equal(to_patches(told, GRID)[~covered], to_patches(images, GRID)[~covered])
    side = {"mean_color": 8, "mean_colors_4x4": 2, "pixels": 1}[target]
    shown, real = (torch.nn.functional.avg_pool2d(each, side) for each in (told, images))
    assert (shown - real).abs().max() < (1e-6 if target == "pixels" else 16.6 / 127.5)  # half a bin and a rounding
    if target != "pixels":
        assert torch.equal(patch_targets(told, GRID, target)[covered], patch_targets(images, GRID, target)[covered])


@pytest.mark.parametrize("norm", [True, False])
def test_of_mae_what_is_told_right_is_shown_right(images, monkeypatch, norm):
    model = create_model(**TINY, decoder_depth=1, decoder_dim=24, decoder_heads=3, num_classes=0, seed=0).eval()
    told_right(model, images, monkeypatch, lambda pictures: pixel_targets(pictures, GRID, norm))
    hidden, told = reconstruct(model, images, norm)
    assert ((to_patches(hidden, GRID) == 0).flatten(2).all(2)).sum(1).tolist() == [12, 12, 12]
    assert torch.allclose(told, images, atol=1e-5)


def test_which_models_tell_patches():
    assert tells_patches(create_model(**TINY, patch_target="pixels", num_classes=0, seed=0))
    assert not tells_patches(create_model(**TINY, seed=0))
    with torch.device("meta"):
        assert not tells_patches(create_model("bit_r50x1", seed=None))
