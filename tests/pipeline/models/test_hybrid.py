"""Hybrids: their ResNet against the official arithmetic and transformers, and the whole against published counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model
from pipeline.models.hybrid import HybridPatchEmbed, StdConv2d, pad_same
from shards.errors import UserError
from tests.pipeline.models.numpy_layers import conv, group_norm, max_pool, same
from tests.pipeline.models.reference_vit import vit_logits

TINY = {
    "backbone": [1, 2],
    "backbone_width": 32,
    "image_size": 32,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 7,
}

JFT = 18_291
# Parameters for K = 0, 1000 and 21843 classes, patches along a side, and 10^9 multiply-adds at 224 pixels for one K.
# (Three of the published ones are with JFT's head; with 1000 classes they are 8.46, 65.54 and 19.41.)
PUBLISHED = {
    "r50_vit_b16": (97_890_112, 98_659_112, 114_687_379, 14, 21.54, 1000),
    "r50_vit_b32": (110_176_832, 110_945_832, 126_974_099, 7, 8.47, JFT),
    "r50_vit_l16": (315_458_624, 316_483_624, 337_847_699, 14, 65.56, JFT),
    "r50_vit_l32": (327_969_856, 328_994_856, 350_358_931, 7, 19.43, JFT),
    "r26_vit_b32": (100_614_976, 101_383_976, 117_412_243, 7, 6.71, 1000),
    "r26_vit_s32": (36_046_912, 36_431_912, 44_456_467, 7, 3.46, 1000),
    "r_vit_ti16": (6_144_704, 6_337_704, 10_360_403, 7, 0.43, 1000),
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter random, so that none is without effect."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    *parameters, grid, _, _ = PUBLISHED[name]
    for num_classes, expected in zip((0, 1000, 21843), parameters, strict=True):
        with torch.device("meta"):
            model = create_model(name, seed=None, num_classes=num_classes)
        assert sum(p.numel() for p in model.parameters()) == expected
        assert model.pos_embed.shape[1] == 1 + grid**2


@pytest.mark.parametrize(
    "name", ["r_vit_ti16", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PUBLISHED][:-1])]
)
def test_multiply_adds(name):
    *_, multiply_adds, classes = PUBLISHED[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name, seed=None, num_classes=classes)(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(multiply_adds, abs=0.005)


def test_parameter_names_are_timms():
    model = create_model("r50_vit_b16", **TINY, seed=None)
    names = {name for name in model.state_dict() if name.startswith("patch_embed.")}
    units = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]
    layers = [("stem.conv", "stem.norm")]
    layers += [(f"{unit}.conv{i}", f"{unit}.norm{i}") for unit in units for i in (1, 2, 3)]
    layers += [(f"{unit}.downsample.conv", f"{unit}.downsample.norm") for unit in units[:2]]
    expected = {"proj.weight", "proj.bias"}
    for convolution, norm in layers:
        expected |= {f"backbone.{name}" for name in (f"{convolution}.weight", f"{norm}.weight", f"{norm}.bias")}
    assert names == {f"patch_embed.{name}" for name in expected}
    # Where the root is all there is, it is the backbone.
    names = set(create_model("r_vit_ti16", depth=1, seed=None).patch_embed.backbone.state_dict())
    assert names == {"conv.weight", "norm.weight", "norm.bias"}


def feature_map(p: dict, image: np.ndarray, units: list[int]) -> np.ndarray:
    """What the patches are cut from, [C, H, W], of one image in float64; ``p`` are the parameters of the embedding."""

    def std_conv(x, name, stride=1):
        w = p[f"{name}.weight"]
        w = w - w.mean((1, 2, 3), keepdims=True)
        w = w / (w.std((1, 2, 3), keepdims=True) + 1e-5)
        return conv(x, w, stride, same(x.shape[1], w.shape[-1], stride))

    def norm(x, name):
        return group_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    root = "backbone.stem" if units else "backbone"
    x = np.maximum(norm(std_conv(image, f"{root}.conv", 2), f"{root}.norm"), 0)
    x = max_pool(x, 3, 2, same(x.shape[1], 3, 2), -np.inf)
    for stage, count in enumerate(units):
        for unit in range(count):
            name, stride = f"backbone.stages.{stage}.blocks.{unit}", 2 if stage and not unit else 1
            shortcut = x
            if unit == 0:
                shortcut = norm(std_conv(x, f"{name}.downsample.conv", stride), f"{name}.downsample.norm")
            y = np.maximum(norm(std_conv(x, f"{name}.conv1"), f"{name}.norm1"), 0)
            y = np.maximum(norm(std_conv(y, f"{name}.conv2", stride), f"{name}.norm2"), 0)
            x = np.maximum(shortcut + norm(std_conv(y, f"{name}.conv3"), f"{name}.norm3"), 0)
    return x


@pytest.mark.parametrize(
    ("units", "patch_size", "side"), [([1, 2], 1, 32), ([1, 1, 1], 2, 64), ([], 8, 64), ([2, 1], 1, 45)]
)
def test_patch_embedding_equals_the_definition(units, patch_size, side):
    model = randomize(HybridPatchEmbed(units, 32, patch_size, 48))
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    p = {name: value.double().numpy() for name, value in model.state_dict().items()}
    maps = [feature_map(p, image, units) for image in images.double().numpy()]
    embeddings = [conv(x, p["proj.weight"], patch_size) + p["proj.bias"][:, None, None] for x in maps]
    expected = np.stack([x.reshape(48, -1).T for x in embeddings])
    with torch.no_grad():
        scale = np.abs(expected).max()  # tens, of no logits yet
        np.testing.assert_allclose(model(images).numpy(), expected, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(model.double()(images.double()).numpy(), expected, rtol=0, atol=1e-11 * scale)


def test_a_filter_whose_values_are_all_equal_is_nothing_and_stays_finite():
    convolution = StdConv2d(3, 4, 3)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        convolution.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        convolution.weight[1], convolution.weight[2] = 0, 0.1
        convolution.weight[3] *= 1e-5  # the epsilon is of its size
    out = convolution(images)
    assert not out[:, 1].any()
    assert out[:, 2].abs().max() < 0.1  # the last bits of a mean
    w = convolution.weight.detach().double().numpy()
    w = w - w.mean((1, 2, 3), keepdims=True)
    expected = conv(images[0].double().numpy(), w / (w.std((1, 2, 3), keepdims=True) + 1e-5), 1, same(8, 3, 1))
    np.testing.assert_allclose(out[0, [0, 3]].detach().numpy(), expected[[0, 3]], rtol=0, atol=1e-5)
    out.square().sum().backward()
    assert convolution.weight.grad.isfinite().all()


def test_logits_equal_the_definition():
    model = randomize(create_model("r50_vit_b16", **TINY))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    p = {name: value.double().numpy() for name, value in model.state_dict().items()}
    embedding = {name.removeprefix("patch_embed."): value for name, value in p.items()}
    maps = np.stack([feature_map(embedding, image, TINY["backbone"]) for image in images.double().numpy()])
    expected = vit_logits(p, maps, TINY["num_heads"])
    with torch.no_grad():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(model(images).numpy(), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(model.double()(images.double()).numpy(), expected, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize(("side", "kernel", "sides"), [(8, 7, (2, 3)), (8, 3, (0, 1)), (9, 3, (1, 1)), (8, 1, (0, 0))])
def test_padding_is_tensorflows(side, kernel, sides):
    padded = pad_same(torch.ones(1, 1, side, side), kernel, 2)[0, 0]
    assert padded.shape == (side + sum(sides),) * 2
    inside = slice(sides[0], sides[0] + side)
    assert padded[inside, inside].sum() == padded.sum() == side * side


def test_backbone_equals_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BitConfig(
        embedding_size=32, hidden_sizes=[128, 256], depths=[1, 2], layer_type="bottleneck", global_padding="SAME",
        embedding_dynamic_padding=True,
    )  # fmt: skip
    theirs = transformers.BitModel(config).eval()
    ours = randomize(HybridPatchEmbed([1, 2], 32, 1, 48)).backbone
    renamed = {}
    for name, value in ours.state_dict().items():
        name = name.replace("stem.conv", "embedder.convolution").replace("stem.norm", "embedder.norm")
        renamed[name.replace("stages", "encoder.stages").replace("blocks", "layers")] = value
    theirs.load_state_dict(renamed, strict=True)
    for module in theirs.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = (
                1e-6  # flax's; theirs is 1e-5. A filter's epsilon matters less: the norm after it undoes its scale.
            )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_first_values():
    values = create_model("r50_vit_b16", **TINY, seed=3).state_dict()
    for name, value in values.items():
        if name.startswith("patch_embed.backbone") and value.dim() == 1:
            gain = 0 if name.endswith("norm3.weight") else 1
            assert (value == (gain if name.endswith("weight") else 0)).all(), name
        elif name.startswith("patch_embed") and value.dim() == 4:  # lecun_normal
            std = value[0].numel() ** -0.5
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert value.abs().max().item() <= 2 * std / 0.87962566 + 1e-6, name
    assert not values["patch_embed.proj.bias"].any()


def test_a_compiled_model_is_one_graph():
    model = randomize(create_model("r50_vit_b16", **TINY)).train()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_unit_begins_as_its_shortcut():
    unit = create_model("r50_vit_b16", **TINY, seed=3).patch_embed.backbone.stages[1].blocks[1]
    x = torch.rand(1, 256, 4, 4)
    with torch.no_grad():
        assert torch.equal(unit(x), x)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("r50_vit_b16", {"image_size": 232}, "image_size 232 is not divisible by 16"),
        ("r50_vit_l32", {"image_size": 240}, "image_size 240 is not divisible by 32"),
        ("r_vit_ti16", {"image_size": 240}, "image_size 240 is not divisible by 32"),
        ("r50_vit_b16", {"backbone": [3, 0]}, r"a stage has no unit: \[3, 0\]"),
        ("r50_vit_b16", {"backbone_width": 40}, "backbone_width 40 is no multiple of 32"),
        ("r50_vit_b8", {}, "unknown model: 'r50_vit_b8' .did you mean .*r50_vit_b"),
    ],
)
def test_mistakes_are_one_line(name, settings, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(name, **settings)
    assert "\n" not in str(error.value)
