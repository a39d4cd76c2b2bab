"""The Vision Transformer against the paper's equations, transformers, and the official first values."""

import math

import numpy as np
import pytest
import torch

from pipeline.models import create_model, model_names
from pipeline.models.initial import initial_value
from pipeline.models.positions import Positions
from shards.errors import UserError
from tests.pipeline.models.reference_vit import vit_logits

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 7}


def randomized(**settings) -> torch.nn.Module:
    """Return a tiny model in eval mode whose every parameter is random, so that none is without effect."""
    model = create_model("vit_ti16", **(TINY | settings)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


# Counts of the official JAX code for K = 0, 1000 and 21843 classes, each without and with pre_logits.
COUNTS = {
    "vit_b32": (87_455_232, 88_045_824, 88_224_232, 88_814_824, 104_252_499, 104_843_091),
    "vit_b16": (85_798_656, 86_389_248, 86_567_656, 87_158_248, 102_595_923, 103_186_515),
    "vit_l32": (305_510_400, 306_560_000, 306_535_400, 307_585_000, 327_899_475, 328_949_075),
    "vit_l16": (303_301_632, 304_351_232, 304_326_632, 305_376_232, 325_690_707, 326_740_307),
    "vit_h14": (630_764_800, 632_404_480, 632_045_800, 633_685_480, 658_745_683, 660_385_363),
    "vit_ti16": (5_524_416, None, 5_717_416, 5_754_472, 9_740_115, None),
    "vit_s16": (21_665_664, None, 22_050_664, 22_198_504, 30_075_219, None),
    "vit_s32": (22_493_952, None, 22_878_952, 23_026_792, 30_903_507, None),
    "vit_b8": (85_807_872, None, 86_576_872, None, 102_605_139, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    columns = [(k, representation) for k in (0, 1000, 21843) for representation in (False, True)]
    for (num_classes, representation), expected in zip(columns, COUNTS[name], strict=True):
        if expected is not None:
            with torch.device("meta"):
                model = create_model(name, seed=None, num_classes=num_classes, representation=representation)
            assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [("vit_b16", 384, 86_859_496), ("vit_l16", 384, 304_715_752), ("vit_h14", 518, 633_470_440)],
)
def test_parameter_count_at_another_resolution(name, image_size, expected):
    with torch.device("meta"):
        model = create_model(name, seed=None, image_size=image_size)
    assert sum(p.numel() for p in model.parameters()) == expected


# What each option has more or less than the plain model, by hand: N = 16 patches, D = 48, M = 192, L = 3 blocks.
@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"pooling": "mean"}, -2 * 48),  # no class token, and no position for it
        ({"pooling": "map"}, -2 * 48 + 48 + 4 * (48 * 48 + 48) + 2 * 48 + 2 * 48 * 192 + 192 + 48),
        ({"registers": 4}, 4 * 48),
        ({"qkv_bias": False}, -3 * 3 * 48),
        ({"position": "none"}, -17 * 48),
        ({"position": "sincos_2d"}, -17 * 48),
        ({"position": "learned_2d"}, -17 * 48 + 8 * 24),
        ({"position": "learned_2d", "position_at": "every"}, -17 * 48 + 3 * 8 * 24),
        ({"position_at": "every"}, 2 * 17 * 48),
        ({"position_at": "shared"}, 0),
        ({"position": "relative", "position_at": "shared"}, -17 * 48 + 31 * 48),
        ({"position": "relative", "position_at": "every"}, -17 * 48 + 3 * 31 * 48),
    ],
)
def test_parameter_counts_of_options(settings, more):
    plain, model = (create_model("vit_ti16", **(TINY | over), seed=None) for over in ({}, settings))
    counts = [sum(p.numel() for p in each.parameters()) for each in (plain, model)]
    assert counts[1] - counts[0] == more


def test_parameter_names_are_timms():
    model = create_model("vit_ti16", **(TINY | {"depth": 1, "representation": True}))
    layers = [
        "patch_embed.proj",
        "blocks.0.norm1",
        "blocks.0.attn.qkv",
        "blocks.0.attn.proj",
        "blocks.0.norm2",
    ]
    layers += ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "norm", "pre_logits.fc", "head"]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(model.state_dict()) == expected | {"cls_token", "pos_embed"}


# Every option of the forward pass, and those that meet: where tokens that are no patch stand beside positions.
FORWARDS = [
    {"gelu": "tanh", "representation": True},
    {"gelu": "exact", "qkv_bias": False},
    {"pooling": "mean", "representation": True},
    {"pooling": "map"},
    {"registers": 3},
    {"pooling": "map", "registers": 2},
    {"position": "none"},
    {"position": "learned", "position_at": "every", "registers": 2},
    {"position": "learned", "position_at": "shared"},
    {"position": "learned", "pooling": "mean", "registers": 1},
    {"position": "learned_2d"},
    {"position": "learned_2d", "position_at": "every", "registers": 2},
    {"position": "learned_2d", "position_at": "shared", "pooling": "mean"},
    {"position": "relative", "position_at": "every"},
    {"position": "relative", "position_at": "shared", "registers": 2},
    {"position": "relative", "position_at": "every", "pooling": "mean"},
    {"position": "sincos_2d", "pooling": "mean", "representation": True},
    {"position": "sincos_2d", "position_at": "shared", "registers": 2},
]


@pytest.mark.parametrize("settings", FORWARDS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_forward_equals_the_equations(images, settings):
    model = randomized(**settings)
    parameters = {name: value.double().numpy() for name, value in model.state_dict().items()}
    reads = {key: value for key, value in settings.items() if key in ("gelu", "pooling", "position", "position_at")}
    expected = vit_logits(parameters, images.double().numpy(), TINY["num_heads"], **reads)
    with torch.no_grad():
        np.testing.assert_allclose(model(images).numpy(), expected, rtol=0, atol=1e-5)
        if settings.get("position") != "sincos_2d":  # whose table is float32
            np.testing.assert_allclose(model.double()(images.double()).numpy(), expected, rtol=0, atol=1e-10)


def transformers_state(state: dict, depth: int) -> dict:
    """Rename our parameters to those of transformers 5 in memory."""
    renamed = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
    }
    pairs = {"vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm"}
    pairs["classifier"] = "head"
    for i in range(depth):
        theirs, ours = f"vit.layers.{i}", f"blocks.{i}"
        pairs[f"{theirs}.layernorm_before"] = f"{ours}.norm1"
        pairs[f"{theirs}.layernorm_after"] = f"{ours}.norm2"
        pairs[f"{theirs}.attention.o_proj"] = f"{ours}.attn.proj"
        pairs[f"{theirs}.mlp.fc1"] = f"{ours}.mlp.fc1"
        pairs[f"{theirs}.mlp.fc2"] = f"{ours}.mlp.fc2"
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                renamed[f"{theirs}.attention.{letter}_proj.{kind}"] = part
    for theirs, ours in pairs.items():
        for kind in ("weight", "bias"):
            renamed[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
    return renamed


def transformers_logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of transformers' ViT with our weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=model.image_size,
        patch_size=model.patch_size,
        hidden_size=model.embed_dim,
        num_hidden_layers=model.depth,
        num_attention_heads=model.num_heads,
        intermediate_size=model.mlp_dim,
        hidden_act={"tanh": "gelu_pytorch_tanh", "exact": "gelu"}[model.gelu],
        layer_norm_eps=1e-6,
        num_labels=model.num_classes,
    )
    with torch.device("meta"):
        theirs = transformers.ViTForImageClassification(config).eval()
    theirs.load_state_dict(transformers_state(model.state_dict(), model.depth), strict=True, assign=True)
    with torch.no_grad():
        return theirs(images).logits


@pytest.mark.parametrize("gelu", ["tanh", "exact"])
def test_forward_equals_transformers(images, gelu):
    model = randomized(gelu=gelu)
    with torch.no_grad():
        torch.testing.assert_close(model(images), transformers_logits(model, images), rtol=0, atol=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "gelu"),
    [
        ("vit_ti16", "tanh"),
        ("vit_b32", "exact"),
        ("vit_b16", "tanh"),
        pytest.param("vit_l32", "exact", marks=SLOW),
        pytest.param("vit_l16", "tanh", marks=SLOW),
        pytest.param("vit_h14", "exact", marks=SLOW),
    ],
)
def test_real_sizes_equal_transformers(name, gelu):
    model = create_model(name, gelu=gelu, num_classes=10, seed=3).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # what begins at 0 or 1 should have an effect
            if parameter.dim() == 1 or key in ("cls_token", "head.weight"):
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.05, generator=generator))
        images = torch.randn(1, 3, 224, 224, generator=generator)
        logits = model(images)
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, transformers_logits(model, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"representation": True, "drop_path": 0.3},
        {"pooling": "map", "registers": 2, "position": "relative", "position_at": "every"},
        pytest.param({"pooling": "mean", "position": "sincos_2d", "position_at": "shared"}, marks=SLOW),
        pytest.param({"position": "learned_2d", "position_at": "every", "registers": 1}, marks=SLOW),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_compiled_model_is_one_graph(images, settings):
    model = randomized(**settings, depth=2).train()
    draws = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # what the graph becomes is the backend's matter
    torch.testing.assert_close(compiled(images, draws), model(images, draws), rtol=1e-5, atol=1e-5)


def test_features_are_what_the_head_sees(images):
    model = randomized(representation=True)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, 48)
        assert features.abs().max() <= 1
        torch.testing.assert_close(model.head(features), model(images))
    headless = randomized(num_classes=0)
    with torch.no_grad():
        torch.testing.assert_close(headless(images), headless.tokens(images)[:, 0])


def test_initial_values_have_the_official_statistics():
    model = create_model("vit_ti16", depth=2, num_classes=10, representation=True, head_bias=-10.0, seed=3)
    values = model.state_dict()

    kernel = values["patch_embed.proj.weight"]
    std = 768**-0.5
    assert kernel.std().item() == pytest.approx(std, rel=0.01)
    assert kernel.abs().max().item() == pytest.approx(2 * std / 0.87962566, rel=0.01)
    assert values["pre_logits.fc.weight"].std().item() == pytest.approx(192**-0.5, rel=0.02)

    for weight, fans in (("attn.qkv", 2 * 192), ("attn.proj", 2 * 192), ("mlp.fc1", 960), ("mlp.fc2", 960)):
        value, limit = values[f"blocks.1.{weight}.weight"], math.sqrt(6 / fans)
        assert limit * 0.999 < value.abs().max().item() <= limit
        assert value.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.01)

    pos_embed = values["pos_embed"]
    assert pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert pos_embed.abs().max() > 0.06  # not truncated
    assert values["blocks.0.mlp.fc1.bias"].std().item() == pytest.approx(1e-6, rel=0.1)
    for name in ("cls_token", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "head.weight", "norm.bias"):
        assert not values[name].any(), name
    assert (values["head.bias"] == -10).all()
    assert (values["blocks.1.norm2.weight"] == 1).all()


def test_initial_values_of_options_have_the_statistics_of_their_sources():
    settings = {"depth": 2, "image_size": 64, "num_classes": 100, "seed": 3, "head_bias": "log_prior"}
    relative = {"position": "relative", "position_at": "every", "pooling": "map", "registers": 64}
    values = create_model("vit_ti16", **settings, **relative).state_dict()
    # big_vision's MAP head: xavier on the probe [1, 192] and on q, k, v and out each.
    probe, limit = values["attn_pool.latent"], math.sqrt(6 / 193)
    assert probe.abs().max().item() == pytest.approx(limit, rel=0.03)
    assert probe.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    for name, fans in (("q", 384), ("kv", 384), ("proj", 384), ("mlp.fc1", 960)):
        kernel, limit = values[f"attn_pool.{name}.weight"], math.sqrt(6 / fans)
        assert limit * 0.999 < kernel.abs().max().item() <= limit
        assert kernel.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.01)
    assert not values["attn_pool.kv.bias"].any()
    assert (values["attn_pool.norm.weight"] == 1).all()
    # Registers all begin near 0, but no two the same.
    assert values["reg_token"].std().item() == pytest.approx(1e-6, rel=0.02)
    assert len(values["reg_token"][0].unique(dim=0)) == 64
    assert torch.allclose(values["head.bias"], torch.tensor(1 / 100).log())

    learned = create_model("vit_ti16", **settings, position="learned_2d", position_at="every").state_dict()
    tables = [learned["pos_embed"], learned["blocks.1.pos_embed"]]
    tables += [values[f"blocks.{i}.pos_embed"] for i in range(2)]
    for table in tables:
        assert table.std().item() == pytest.approx(0.02, rel=0.05)
        assert abs(table.mean().item()) < 0.003
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[2], tables[3])


def test_initial_values_depend_on_seed_and_name_alone():
    before = torch.get_rng_state()
    shallow = create_model("vit_ti16", **(TINY | {"depth": 2}), seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    deep_model = create_model("vit_ti16", **(TINY | {"depth": 4}), seed=5)
    deep = deep_model.state_dict()
    for name, value in shallow.items():
        assert torch.equal(value, deep[name]), name
        assert torch.equal(value, initial_value(deep_model, name, tuple(value.shape), 5)), name
    assert not torch.equal(deep["blocks.0.attn.qkv.weight"], deep["blocks.1.attn.qkv.weight"])
    other = create_model("vit_ti16", **TINY, seed=6).state_dict()
    assert not torch.equal(other["pos_embed"], deep["pos_embed"])


def test_initial_value_of_a_foreign_parameter():
    model = create_model("vit_ti16", **TINY, seed=None)
    for name in ("mask_token.weight", "mask_token", "head.scale"):
        with pytest.raises(ValueError, match=name):
            initial_value(model, name, (1, 48), 0)


def test_dropout_works_in_training_only(images):
    model = randomized(dropout=0.3)
    with torch.no_grad():
        assert torch.equal(model(images), model(images))
        model.train()
        assert not torch.equal(model(images), model(images))


def test_dropout_sits_where_the_paper_has_it():
    """Once after the position embeddings, thrice a block (attention's output, MLP layers), not on q, k, v."""
    model = create_model("vit_ti16", **TINY, dropout=0.5).train()
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda _m, _i, output, name=name: calls.append((name, output.shape[-1])))
    model(torch.zeros(1, 3, 32, 32))
    block = [("attn.dropout", 48), ("mlp.dropout", 192), ("mlp.dropout", 48)]
    expected = [("dropout", 48)] + [(f"blocks.{i}.{name}", width) for i in range(3) for name, width in block]
    assert calls == expected


def test_drop_path_skips_whole_branches_of_single_samples(images):
    model = randomized(drop_path=0.5).train()
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    with torch.no_grad():
        kept = torch.full((2, 3, 2), 0.999)
        one_skips = kept.clone()
        one_skips[0, 2] = 0.499
        all_kept, mixed = model(images, kept), model(images, one_skips)
        torch.testing.assert_close(mixed[1], all_kept[1])
        assert not torch.allclose(mixed[0], all_kept[0])

        # With both branches of the last block skipped, the sample sees the model without that block.
        del model.blocks[2]
        torch.testing.assert_close(model(images, kept[:, :2])[0], mixed[0])


def test_drop_path_keeps_the_expectation():
    block = randomized(drop_path=0.5).blocks[2]
    x, draws = torch.randn(1, 5, 48).expand(4000, 5, 48), torch.rand(4000, 2)
    draws[:, 1] = 0  # always skip the MLP: what is left is x + attention, kept half of the time, doubled
    with torch.no_grad():
        branch = block(x, draws) - x
        expected = block.attn(block.norm1(x[:1]))[0]
        share = (draws[:, 0] >= 0.5).float().mean()
    torch.testing.assert_close(branch.mean(0), expected * 2 * share, rtol=1e-3, atol=1e-4)
    assert share.item() == pytest.approx(0.5, abs=0.05)


def test_drop_path_is_off_in_evaluation(images):
    model = randomized(drop_path=0.9)
    with torch.no_grad():
        assert torch.equal(model(images, torch.zeros(2, 3, 2)), model(images))
        model.train()
        many = images.repeat(32, 1, 1, 1)  # two images draw the same twice in one of 30 tries
        assert not torch.equal(model(many), model(many))


def test_names_cover_sizes_and_patches():
    assert {"vit_ti8", "vit_s14", "vit_b32", "vit_l16", "vit_h14"} <= set(model_names())
    with torch.device("meta"):
        models = [create_model(name, seed=None) for name in model_names() if name.startswith("vit_")]
    assert {model.patch_size for model in models} == {8, 14, 16, 32}


def test_shared_positions_are_laid_out_once(monkeypatch):
    laid_out = []
    table = Positions.table
    monkeypatch.setattr(Positions, "table", lambda *arguments: laid_out.append(0) or table(*arguments))
    model = create_model("vit_ti16", **TINY, position="learned_2d", position_at="shared")
    model(torch.zeros(1, 3, 32, 32))
    assert len(laid_out) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vit_b17", {}, r"unknown model: 'vit_b17' \(did you mean 'vit_b16' or '"),
        ("ViT-B/16", {}, r"unknown model: 'ViT-B/16' \(did you mean 'vit_b16'\?\)$"),
        ("ViT-H/14", {}, r"unknown model: 'ViT-H/14' \(did you mean 'vit_h14'\?\)$"),
        ("R50+ViT-B/16", {}, r"unknown model: 'R50\+ViT-B/16' \(did you mean 'r50_vit_b16'\?\)$"),
        ("Axial-ViT-B/32", {}, r"\(did you mean 'axial_vit_b32'\?\)$"),
        ("BiT-R152x4", {}, r"\(did you mean 'bit_r152x4'\?\)$"),
        ("R50+B/16", {}, r"\(did you mean 'r50_vit_b16'"),
        ("resnet50", {}, r"unknown model: 'resnet50'; known: ViTs such as vit_b16, .* docs/models.md has all of them$"),
        ("vit_ti16", {"dpeth": 3}, "unknown setting of vit_ti16: 'dpeth' .did you mean 'depth'"),
        ("vit_ti16", {"image_size": 225}, "image_size 225 is not divisible by patch_size 16; take 224 or 240$"),
        ("vit_ti16", {"num_heads": 5}, "embed_dim 192 is not divisible by num_heads 5; take 4 or 6$"),
        ("vit_ti16", {"embed_dim": 2**62, "num_heads": 3}, "not divisible by num_heads 3; take 2 or 4$"),  # at once
        ("vit_ti16", {"num_heads": 200}, "not divisible by num_heads 200; take 192$"),
        ("vit_ti16", {"gelu": "relu"}, "unknown gelu: 'relu'"),
        ("vit_ti16", {"depth": 0}, "depth is too small: 0"),
        ("vit_ti16", {"drop_path": 1.0}, "drop_path is no rate: 1.0"),
        ("vit_ti16", {"num_classes": -1}, "num_classes is negative: -1"),
        ("vit_ti16", {"registers": -1}, "registers is negative: -1; give 0 for none"),
        ("vit_ti16", {"num_heads": 0}, "num_heads is too small: 0"),
        ("vit_h14", {"image_size": 384}, "image_size 384 is not divisible by patch_size 14; take 378 or 392$"),
        ("vit_b16", {"image_size": 8}, "image_size 8 is not divisible by patch_size 16; take 16$"),
        ("vit_ti16", {"pooling": "gap"}, "unknown pooling: 'gap'; take one of cls, mean, map"),
        ("vit_ti16", {"position": "1d"}, "unknown position: '1d'; take one of learned, learned_2d, relative"),
        ("vit_ti16", {"position_at": "all"}, "unknown position_at: 'all'; take one of stem, every, shared"),
        ("vit_ti16", {"position": "relative"}, "'relative' works in attention; set position_at to 'every' or 'shared'"),
        ("vit_ti16", {"position": "none", "position_at": "every"}, "'none' has nothing to put at position_at 'every'"),
        ("vit_ti16", {"position": "sincos_2d", "position_at": "every"}, "no block has its own; set .* to 'shared'"),
        (
            "vit_ti16",
            {"position": "sincos_2d", "embed_dim": 6},
            "width 6 does not suit 'sincos_2d'; take a mult",
        ),
        (
            "vit_ti16",
            {"position": "learned_2d", "embed_dim": 9},
            "embed_dim 9 is odd, and position 'learned_2d'",
        ),
        (
            "vit_b16",
            {"backbone": [3, 4, 9]},
            "by 256, .* take 256, or set patch_size to 1 as hybrids such as r50_vit_b16",
        ),
        ("r_vit_ti16", {"image_size": 240}, "by 32, the side of this hybrid's tokens in pixels; take 224 or 256$"),
        ("vit_b16", {"image_size": "224"}, "image_size of vit_b16 is '224', of another type than it takes; give int$"),
        ("vit_b16", {"image_size": (224, 224)}, r"image_size of vit_b16 is \(224, 224\), .*; give int$"),
        ("vit_b16", {"image_size": 224.0}, r"image_size of vit_b16 is 224\.0, .*; give int$"),
        ("vit_b16", {"num_classes": "x"}, "num_classes of vit_b16 is 'x', .*; give int$"),
        ("vit_b16", {"dropout": "a"}, "dropout of vit_b16 is 'a', .*; give float$"),
        ("vit_b16", {"depth": None}, "depth of vit_b16 is None, .*; give int$"),
        ("vit_b16", {"backbone": 3}, r"backbone of vit_b16 is 3, .*; give list\[int\] \| None$"),
        ("bit_r50x1", {"units": 3}, r"units of bit_r50x1 is 3, .*; give list\[int\]$"),
        ("bit_r50x1", {"units": [1, 2.5]}, r"units of bit_r50x1 is \[1, 2\.5\], .*; give list\[int\]$"),
        ("vit_b16", {"registers": 1.5}, r"registers of vit_b16 is 1\.5, .*; give int$"),
        ("vit_b16", {"num_heads": 12.0}, r"num_heads of vit_b16 is 12\.0, .*; give int$"),
        ("vit_b16", {"head_bias": None}, r"head_bias of vit_b16 is None, .*; give float \| str$"),
        ("axial_vit_b16", {"representation": 1}, "representation of axial_vit_b16 is 1, .*; give bool$"),
        ("vit_ti16", {"head_bias": "prior"}, "unknown head_bias: 'prior'; give a number or 'log_prior'"),
    ],
)
def test_mistakes_are_one_line(name, settings, message):
    with pytest.raises(UserError, match=message) as error:
        create_model(name, **settings)
    assert "\n" not in str(error.value)
