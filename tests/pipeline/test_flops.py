"""Parameters and arithmetic, against the published numbers and against the equations counted by hand."""

from functools import cache

import pytest

from pipeline.config import TrainSettings
from pipeline.estimate import estimate_stage
from pipeline.flops import Cost, cost_of
from pipeline.settings import check

JFT = 303_000_000


@cache
def cost(name: str, size: int) -> Cost:
    return cost_of(name, image_size=size)


@pytest.mark.parametrize(
    ("name", "size", "gmacs"),
    [
        ("vit_b32", 224, 4.409), ("vit_b32", 384, 13.04), ("vit_b32", 512, 23.65),
        ("vit_b16", 224, 17.564), ("vit_b16", 384, 55.48), ("vit_b16", 512, 107.03),
        ("vit_l32", 224, 15.378), ("vit_l32", 384, 45.28), ("vit_l32", 512, 81.66),
        ("vit_l16", 224, 61.555), ("vit_l16", 384, 191.07), ("vit_l16", 512, 361.99),
        ("vit_h14", 224, 167.295), ("vit_h14", 378, 503.5), ("vit_h14", 518, 1016.72),
        ("vit_s16", 224, 4.599), ("vit_s16", 384, 15.49), ("vit_ti16", 224, 1.254), ("vit_ti16", 384, 4.68),
        ("r50_vit_b16", 224, 21.54), ("r50_vit_l16", 224, 65.54), ("r50_vit_b32", 224, 8.46),
        ("r50_vit_l32", 224, 19.41), ("r26_vit_b32", 224, 6.71), ("r26_vit_s32", 224, 3.46), ("r_vit_ti16", 224, 0.43),
        ("bit_r50x1", 224, 4.09), ("bit_r50x2", 224, 16.12), ("bit_r101x1", 224, 7.80), ("bit_r152x1", 224, 11.51),
        ("bit_r152x2", 224, 45.81), ("bit_r200x3", 224, 134.35), ("bit_r152x4", 224, 182.78), ("bit_r50x3", 224, 36.08),
    ],
)  # fmt: skip
@pytest.mark.long
def test_forward_cost_is_the_published_one(name, size, gmacs):
    digits = len(str(gmacs).partition(".")[2])
    assert round(cost(name, size).macs / 1e9, digits) == gmacs


@pytest.mark.parametrize(
    ("name", "epochs", "exaflops", "paper"),
    [
        ("vit_b32", 7, 56, 55), ("vit_b16", 7, 223.5, 224), ("vit_l32", 7, 195.7, 196), ("vit_l16", 7, 783.3, 783),
        ("vit_l16", 14, 1566.7, 1567), ("vit_h14", 14, 4258, 4262),
        ("r50_vit_b16", 7, 274, 274), ("r50_vit_l32", 7, 247, 246), ("r50_vit_l16", 14, 1668, 1668),
        ("r50_vit_b32", 7, 108, 106),
        # The paper leaves something small out of its ResNets.
        ("bit_r50x1", 7, 52, 50), ("bit_r152x2", 7, 583, 563), ("bit_r200x3", 14, 3419, 3306),
    ],
)  # fmt: skip
def test_training_cost_is_that_of_the_papers_table_6(name, epochs, exaflops, paper):
    found = cost(name, 224).training_flops(epochs * JFT) / 1e18
    digits = len(str(exaflops).partition(".")[2])
    assert round(found, digits) == exaflops
    assert found == pytest.approx(paper, rel=0.041 if name.startswith("bit") else 0.021)


def by_hand(*, size: int, patch: int, width: int, depth: int, mlp: int, classes: int) -> int:
    patches = (size // patch) ** 2
    tokens = patches + 1
    block = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp
    return patches * 3 * patch**2 * width + depth * block + width * classes


@pytest.mark.parametrize(("heads", "hidden"), [(3, 0), (6, 1)])
def test_forward_cost_is_that_of_the_equations_to_the_digit(heads, hidden):
    found = cost_of(
        "vit_ti16", image_size=60, patch_size=12, embed_dim=66, depth=3, num_heads=heads, mlp_dim=100, num_classes=7,
        representation=bool(hidden),
    )  # fmt: skip
    assert found.macs == by_hand(size=60, patch=12, width=66, depth=3, mlp=100, classes=7) + hidden * 66**2
    assert found.flops == 2 * found.macs
    assert found.training_flops(10) == 60 * found.macs


@pytest.mark.parametrize(("target", "outputs"), [("mean_color", 512), ("mean_colors_4x4", 16 * 512), ("pixels", 432)])
def test_masked_patch_prediction_has_its_head_on_every_corrupted_patch(target, outputs):
    model = {"image_size": 60, "patch_size": 12, "embed_dim": 66, "depth": 3, "num_heads": 3, "mlp_dim": 100}
    features = by_hand(size=60, patch=12, width=66, depth=3, mlp=100, classes=0)
    for share, corrupted in ((0.5, 12), (0.001, 1), (1.0, 25)):
        found = cost_of("vit_ti16", **model, num_classes=0, patch_target=target, hidden=share)
        assert found.macs == features + corrupted * 66 * outputs
    stage = {"kind": "masked_patch", "duration": "10 samples", "global_batch": 1,
             "data": {"train": "a", "resolution": 60},
             "model": {"name": "vit_ti16"} | {key: model[key] for key in model if key != "image_size"},
             "masked_patch": {"target": target, "share": 1.0}}  # fmt: skip
    assert estimate_stage(check(TrainSettings, stage, "test"), 7, 10)["forward_macs"] == features + 25 * 66 * outputs


def test_parameters_are_counted_to_the_digit():
    assert cost_of("vit_h14").parameters == 632_045_800
    assert cost_of("vit_l16", num_classes=21_843, representation=True).parameters == 326_740_307
