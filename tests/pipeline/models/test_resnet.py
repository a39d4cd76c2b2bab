"""BiT's ResNets against their definition, transformers, and the published counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models import create_model
from shards.errors import UserError
from tests.pipeline.models.numpy_layers import conv, group_norm, max_pool

TINY = {"units": [1, 2, 1], "width": 32, "image_size": 32, "num_classes": 7}

# Parameters for K = 0, 1000, 21843 and 18291 (JFT) classes, and 10^9 multiply-adds at 224 pixels with K = 1000.
PUBLISHED = {
    "bit_r50x1": (23_500_352, 25_549_352, 68_256_659, 60_978_611, 4.09),
    "bit_r50x2": (93_891_712, 97_988_712, 183_382_483, 168_829_939, 16.12),
    "bit_r101x1": (42_492_480, 44_541_480, 87_248_787, 79_970_739, 7.80),
    "bit_r152x1": (58_136_128, 60_185_128, 102_892_435, 95_614_387, 11.51),
    "bit_r152x2": (232_238_208, 236_335_208, 321_728_979, 307_176_435, 45.81),
    "bit_r200x3": (562_488_000, 568_633_000, 696_713_235, 674_886_195, 134.35),
    "bit_r152x4": (928_340_224, 936_533_224, 1_107_299_923, 1_078_198_387, 182.78),
    "bit_r50x3": (211_174_080, 217_319_080, None, None, 36.08),
    "bit_r101x3": (381_789_888, 387_934_888, None, None, None),
}


def randomized(**settings) -> torch.nn.Module:
    """Return a tiny model whose every parameter is random, so that none is without effect."""
    model = create_model("bit_r50x1", **(TINY | settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    *parameters, _ = PUBLISHED[name]
    for num_classes, expected in zip((0, 1000, 21843, 18291), parameters, strict=True):
        if expected is not None:
            with torch.device("meta"):
                model = create_model(name, seed=None, num_classes=num_classes)
            assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    "name", ["bit_r50x1", *(pytest.param(name, marks=pytest.mark.slow) for name in [*PUBLISHED][1:-1])]
)
def test_multiply_adds(name):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        create_model(name, seed=None)(torch.empty(1, 3, 224, 224))
    assert counter.get_total_flops() / 2e9 == pytest.approx(PUBLISHED[name][-1], abs=0.005)


def test_parameter_names_are_timms():
    names = set(create_model("bit_r50x1", **(TINY | {"units": [1, 2]}), seed=None).state_dict())
    units = ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]
    expected = {"stem.conv.weight", "norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    expected |= {f"{unit}.downsample.conv.weight" for unit in units[:2]}
    for unit in units:
        for i in (1, 2, 3):
            expected |= {f"{unit}.conv{i}.weight", f"{unit}.norm{i}.weight", f"{unit}.norm{i}.bias"}
    assert names == expected


def numpy_forward(p: dict, image: np.ndarray, units: list[int]) -> np.ndarray:
    """Logits of one image in float64."""

    def standard(name):
        w = p[f"{name}.weight"]
        mean, variance = w.mean((1, 2, 3), keepdims=True), w.var((1, 2, 3), keepdims=True)
        return (w - mean) / np.sqrt(variance + 1e-10)

    def norm_relu(x, name):
        return np.maximum(group_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], 1e-5), 0)

    x = conv(image, standard("stem.conv"), stride=2, pad=(3, 3))
    x = max_pool(x, 3, 2, (1, 1), 0.0)
    for stage, count in enumerate(units):
        for unit in range(count):
            name, stride = f"stages.{stage}.blocks.{unit}", 2 if stage and not unit else 1
            y = norm_relu(x, f"{name}.norm1")
            shortcut = conv(y, standard(f"{name}.downsample.conv"), stride=stride) if not unit else x
            y = conv(y, standard(f"{name}.conv1"))
            y = conv(norm_relu(y, f"{name}.norm2"), standard(f"{name}.conv2"), stride=stride, pad=(1, 1))
            x = shortcut + conv(norm_relu(y, f"{name}.norm3"), standard(f"{name}.conv3"))
    features = norm_relu(x, "norm").mean((1, 2))
    return p["head.fc.weight"][:, :, 0, 0] @ features + p["head.fc.bias"]


@pytest.mark.parametrize("side", [32, 37])
def test_forward_equals_the_definition(side):
    model, images = randomized(), torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    p = {name: value.double().numpy() for name, value in model.state_dict().items()}
    expected = np.stack([numpy_forward(p, image, TINY["units"]) for image in images.double().numpy()])
    with torch.no_grad():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(model(images).numpy(), expected, rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(model.double()(images.double()).numpy(), expected, rtol=0, atol=1e-11 * scale)


def test_forward_equals_transformers(images):
    transformers = pytest.importorskip("transformers")
    config = transformers.BitConfig(
        embedding_size=32, hidden_sizes=[128, 256, 512], depths=TINY["units"], num_labels=7, layer_type="preactivation"
    )
    theirs, model = transformers.BitForImageClassification(config).eval(), randomized()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.eps = 1e-10  # the official code's; theirs is 1e-8
    renamed = {}
    for name, value in model.state_dict().items():
        if name.startswith("head.fc."):
            renamed[name.replace("head.fc", "classifier.1")] = value.flatten(1) if value.dim() == 4 else value
        else:
            name = name.replace("stem.conv", "embedder.convolution")
            renamed["bit." + name.replace("stages", "encoder.stages").replace("blocks", "layers")] = value
    theirs.load_state_dict(renamed, strict=True)
    with torch.no_grad():
        expected = theirs(images).logits
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_features_are_what_the_head_sees(images):
    model = randomized()
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, model.embed_dim) == (2, 512)
        torch.testing.assert_close(features @ model.head.fc.weight[:, :, 0, 0].T + model.head.fc.bias, model(images))
    headless = randomized(num_classes=0)
    with torch.no_grad():
        torch.testing.assert_close(headless(images), headless.features(images))


def test_the_scale_of_a_filter_has_no_effect(images):
    model = randomized()
    with torch.no_grad():
        before = model(images)
        model.stages[1].blocks[0].conv2.weight.mul_(3).add_(0.5)
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)


def test_first_values():
    values = create_model("bit_r50x1", **(TINY | {"head_bias": -10.0}), seed=3).state_dict()
    for name, value in values.items():
        if name == "head.fc.weight":
            assert not value.any()
        elif name == "head.fc.bias":
            assert (value == -10).all()
        elif value.dim() == 1:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        else:  # lecun_normal
            std = value[0].numel() ** -0.5
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert value.abs().max().item() <= 2 * std / 0.87962566 + 1e-6, name


def test_it_trains_in_training_mode(images):
    """Every parameter but the head's kernel has a gradient once the head is not zero."""
    model = randomized().train()
    model(images, None).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_compiled_model_is_one_graph(images):
    model = randomized().train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"units": []}, r"units is empty: \[\]"),
        ({"units": [1, 0]}, r"a stage has no unit: \[1, 0\]"),
        ({"width": 48}, "width 48 is no multiple of 32"),
        ({"num_classes": -1}, "num_classes is negative: -1"),
        ({"image_size": 0}, "image_size is too small: 0"),
        ({"depth": 3}, "unknown setting of bit_r50x1: 'depth'"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(UserError, match=message) as error:
        create_model("bit_r50x1", **settings)
    assert "\n" not in str(error.value)
