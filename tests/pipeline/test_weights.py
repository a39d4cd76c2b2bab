import inspect
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint
from pipeline.config import TrainSettings
from pipeline.convert.convert import convert
from pipeline.convert.recognise import open_source
from pipeline.convert.source import Source
from pipeline.models import create_model
from pipeline.models.positions import interpolate_pos_embed
from pipeline.recipe import read_recipe, recipe_names
from pipeline.settings import check, merge
from pipeline.weights import check_model, first_values, resolve_model, write_weights
from shards.errors import UserError

MODEL = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1, "image_size": 16, "num_classes": 5}


@pytest.fixture
def weights(tmp_path) -> Source:
    model = create_model(**MODEL, representation=True, seed=7)
    note = {"model": MODEL | {"representation": True, "head_bias": -3.0}, "classes": list("abcde")}
    write_weights(tmp_path / "w.safetensors", dict(model.state_dict()), note)
    return open_source(tmp_path / "w.safetensors")


def settings(**over) -> TrainSettings:
    base = {
        "kind": "finetune",
        "duration": "1 step",
        "global_batch": 1,
        "init": "-",
        "data": {"train": "-", "resolution": 32},
    }
    return check(TrainSettings, merge(base, over), "test")


def test_a_weights_file_gives_its_model_back(weights):
    model = create_model(**MODEL, representation=True, seed=7).eval()
    images = torch.randn(2, 3, 16, 16)
    assert weights.build()(images).equal(model(images))


def test_fine_tuning_drops_the_head_and_stretches_the_positions(weights):
    resolved = resolve_model(settings(), weights, num_classes=3)
    assert resolved == MODEL | {"image_size": 32, "num_classes": 3, "representation": False, "head_bias": 0.0}
    template = create_model(**resolved, seed=None)
    value_of = first_values(template, weights, settings())
    values = {name: value_of(name, tuple(p.shape)) for name, p in template.named_parameters()}
    assert values["head.weight"].count_nonzero() == 0
    assert values["head.bias"].count_nonzero() == 0
    assert values["pos_embed"].equal(interpolate_pos_embed(weights.tensor("pos_embed"), 4))
    assert values["blocks.0.mlp.fc1.weight"].equal(weights.tensor("blocks.0.mlp.fc1.weight"))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"position_at": "every"}, ["pos_embed", "blocks.1.pos_embed"]),
        ({"position": "learned_2d", "position_at": "every"}, ["pos_embed", "blocks.1.pos_embed"]),
        ({"position": "learned_2d", "pooling": "mean"}, ["pos_embed"]),
        ({"position": "sincos_2d", "pooling": "mean", "registers": 2}, []),
    ],
)
def test_fine_tuning_stretches_every_kind_of_position_embeddings(tmp_path, options, names):
    small = MODEL | {"depth": 2} | options
    state = dict(create_model(**small, seed=7).state_dict())
    write_weights(tmp_path / "w.safetensors", state, {"model": small, "classes": list("abcde")})
    weights = open_source(tmp_path / "w.safetensors")
    assert sorted(name for name in weights.parameters() if name.endswith("pos_embed")) == sorted(names)
    large = create_model(**resolve_model(settings(), weights, num_classes=5), seed=None)
    value_of = first_values(large, weights, settings())
    for name, parameter in large.named_parameters():
        value = value_of(name, tuple(parameter.shape))
        if name in names:
            assert value.equal(large.positions.resize(state[name]))
            assert value.shape[1] > state[name].shape[1]
        elif not name.startswith("head."):
            assert value.equal(state[name])
    if options["position" if "position" in options else "position_at"] == "sincos_2d":
        assert large.pos_embed.shape == (1, 16 + 2, 24)


def test_relative_positions_stay_at_their_resolution(tmp_path):
    small = MODEL | {"position": "relative", "position_at": "every"}
    write_weights(tmp_path / "w.safetensors", create_model(**small).state_dict(), {"model": small, "classes": []})
    weights, name = open_source(tmp_path / "w.safetensors"), "blocks.0.pos_embed"
    for resolution in (16, 32):
        stage = settings(data={"resolution": resolution})
        model = create_model(**resolve_model(stage, weights, num_classes=3), seed=None)
        value_of, shape = first_values(model, weights, stage), tuple(model.get_parameter(name).shape)
        if resolution == 16:
            assert value_of(name, shape).equal(weights.tensor(name))
        else:
            with pytest.raises(UserError, match="of a grid of 2 x 2 patches cannot go to 4 x 4"):
                value_of(name, shape)


HYBRID = MODEL | {"name": "r50_vit_b16", "patch_size": 1, "backbone": [1, 1], "backbone_width": 32}
HYBRID_SETTINGS = {key: HYBRID[key] for key in ("name", "patch_size", "backbone", "backbone_width")}
BIT = {"name": "bit_r50x1", "units": [1, 1], "width": 32, "image_size": 16, "num_classes": 5}


@pytest.mark.parametrize(
    "small", [HYBRID, MODEL | {"name": "axial_vit_b16", "patch_size": 8}, BIT], ids=lambda m: m["name"]
)
def test_fine_tuning_takes_every_kind_of_model_to_another_resolution(tmp_path, small):
    state = dict(create_model(**small, seed=7).state_dict())
    write_weights(tmp_path / "w.safetensors", state, {"model": small, "classes": list("abcde")})
    weights = open_source(tmp_path / "w.safetensors")
    resolved = resolve_model(settings(), weights, num_classes=3)
    assert resolved == small | {"image_size": 32, "num_classes": 3, "head_bias": 0.0}
    template = create_model(**resolved, seed=None)
    value_of = first_values(template, weights, settings())
    for name, parameter in template.named_parameters():
        value = value_of(name, tuple(parameter.shape))
        if name.startswith("head."):
            assert value.count_nonzero() == 0
        elif name == "pos_embed":
            assert value.equal(template.positions.resize(state[name]))
        else:
            assert value.equal(state[name])


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if read_recipe(name).settings.get("kind") == "finetune"]
)
def test_fine_tuning_recipes_have_no_dropout_of_the_weights(tmp_path, name):
    table = merge(read_recipe(name).settings, {"data": {"train": "-"}, "init": "-"})
    drops = {"dropout": 0.1, "drop_path": 0.1}
    of_its_own = {"dropout": 0.2, "drop_path": 0.3}
    asked = table.get("model", {})
    vit = asked if "name" in asked else MODEL | {"name": "vit_ti16"}
    own = (asked.get("dropout", 0.0), asked.get("drop_path", 0.0))
    for model, over, expected in ((vit | drops, {}, own), (vit, of_its_own, (0.2, 0.3)), (BIT, {}, None)):
        if model is BIT and asked:  # settings of ViTs
            continue
        write_weights(tmp_path / "w.safetensors", create_model(**model).state_dict(), {"model": model, "classes": []})
        stage = check(TrainSettings, merge(table, {"model": over}), name)
        resolved = resolve_model(stage, open_source(tmp_path / "w.safetensors"), 3)
        with torch.device("meta"):
            made = create_model(**resolved, seed=None)
        if expected:
            assert (made.dropout.p, made.drop_path) == expected


def test_models_of_two_kinds_and_of_two_shapes_are_refused(tmp_path):
    def weights(model):
        write_weights(
            tmp_path / "w.safetensors", dict(create_model(**model).state_dict()), {"model": model, "classes": []}
        )
        return open_source(tmp_path / "w.safetensors")

    with pytest.raises(UserError, match="its name is bit_r50x1, the settings say vit_ti8"):
        resolve_model(settings(model={"name": "vit_ti8"}), weights(BIT), 5)
    with pytest.raises(UserError, match=r"its units is \[1, 1\], the settings say \[3, 4, 6, 3\]"):
        resolve_model(settings(model={"name": "bit_r50x1", "width": 32}), weights(BIT), 5)
    with pytest.raises(UserError, match=r"its backbone is \[1, 1\], the settings say \[1, 2\]"):
        resolve_model(settings(model={"backbone": [1, 2]}), weights(HYBRID), 5)
    said = "data.resolution 36 is not divisible by 8, the side of this hybrid's tokens in pixels; take 32 or 40$"
    with pytest.raises(UserError, match=rf"w\.safetensors: {said}"):
        resolve_model(settings(data={"train": "-", "resolution": 36}), weights(HYBRID), 5)
    with pytest.raises(UserError, match=rf"^here\.toml: {said}"):
        check_model(settings(data={"resolution": 36}, model=HYBRID_SETTINGS), "here.toml")


def test_another_model_is_refused_by_name_of_what_differs(weights):
    other = settings(model={"name": "vit_ti8", "embed_dim": 48, "num_heads": 3, "depth": 1})
    with pytest.raises(UserError, match="its embed_dim is 24, the settings say 48"):
        resolve_model(other, weights, 5)
    for setting, message in (
        ({"pooling": "mean"}, "its pooling is cls, the settings say mean"),
        ({"position": "none"}, "its position is learned, the settings say none"),
        ({"registers": 1}, "its registers is 0, the settings say 1"),
        ({"qkv_bias": False}, "its qkv_bias is True, the settings say False"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_model(settings(model=setting), weights, 5)
    assert resolve_model(settings(model={"dropout": 0.1, "drop_path": 0.2}), weights, 5)["drop_path"] == 0.2
    pretrain = settings(kind="supervised", data={"resolution": 16})
    template = create_model(**MODEL | {"num_classes": 9}, seed=None)
    with pytest.raises(UserError, match=r"has head.weight of shape \[5, 24\], this model wants \[9, 24\]"):
        first_values(template, weights, pretrain)("head.weight", (9, 24))


def test_other_kinds_say_that_fine_tuning_alone_makes_a_head(tmp_path, weights):
    """A checkpoint of the same model, of another objective: what is missing is a head, and who makes one is told."""
    small = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}
    masked = settings(kind="masked_patch", init=None, model=small, data={"resolution": 16})
    model = resolve_model(masked, None, 3)
    write_weights(tmp_path / "m.safetensors", create_model(**model).state_dict(), {"model": model, "classes": []})

    def begin(stage: TrainSettings, init: Source) -> None:
        template = create_model(**resolve_model(stage, init, 5), seed=None)
        value_of = first_values(template, init, stage)
        for name, parameter in template.named_parameters():
            value_of(name, tuple(parameter.shape))

    from_masked = settings(kind="supervised", data={"resolution": 16})
    with pytest.raises(UserError, match=r"has no head\.weight, .* only kind 'finetune' makes a new head"):
        begin(from_masked, open_source(tmp_path / "m.safetensors"))
    begin(settings(data={"resolution": 16}), open_source(tmp_path / "m.safetensors"))
    from_classes = settings(kind="masked_patch", data={"resolution": 16})
    with pytest.raises(UserError, match=r"has no mask_token, .* only kind 'finetune' makes a new head"):
        begin(from_classes, weights)


@pytest.mark.parametrize("name", ["axial_vit_b16", "bit_r50x1"])
def test_models_without_a_head_on_every_patch_are_no_masked_patch_predictors(name):
    stage = settings(kind="masked_patch", init=None, model={"name": name}, data={"resolution": 224})
    for refuses in (lambda: check_model(stage, "test"), lambda: resolve_model(stage, None, 3)):
        with pytest.raises(UserError, match=f"masked patch prediction .* {name!r} has no such head"):
            refuses()
    unknown = settings(kind="masked_patch", init=None, model={"name": "vit_b61"})
    with pytest.raises(UserError, match="test: unknown model: 'vit_b61'"):
        check_model(unknown, "test")


def test_files_that_are_no_weights_are_one_line(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match=r"there is no .*none\.safetensors; give a checkpoint or training stage"):
        open_source(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(UserError, match="no readable safetensors file"):
        open_source(tmp_path / "bad.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(UserError, match="has tensors such as a, which no known format has"):
        open_source(tmp_path / "plain.safetensors")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("format", ["transformers", "npz", "checkpoint"])
def test_a_stage_starts_from_weights_of_any_format_as_from_ours(tmp_path, format):
    model = MODEL | {"name": "vit_ti16", "patch_size": 8, "num_heads": 3}
    file, other = tmp_path / "w.safetensors", tmp_path / "other"
    write_weights(file, create_model(**model, seed=7).state_dict(), {"model": model, "classes": list("abcde")})
    if format == "checkpoint":
        made = dict(create_model(**model, seed=7).named_parameters())
        pieces = [("weight", name, 0, value.detach().flatten()) for name, value in made.items()]
        state = {"model": model, "classes": list("abcde"), "val": None, "commit": "", "versions": {}, "settings": {}}
        checkpoint.save(other / "checkpoints", 8, pieces, {name: tuple(v.shape) for name, v in made.items()}, state)
    else:
        convert(file, other.with_suffix(".npz") if format == "npz" else other, format)
    init = other.with_suffix(".npz") if format == "npz" else other
    expected, found = (began(settings(init=str(path)), path) for path in (file, init))
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(found[1][name].equal(expected[1][name]) for name in found[1])


def began(stage: TrainSettings, path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return the model that a stage makes of weights, and its first values."""
    init = open_source(path)
    resolved = resolve_model(stage, init, 3)
    template = create_model(**resolved, seed=None)
    value_of = first_values(template, init, stage)
    full = inspect.signature(type(template)).parameters
    values = {name: value_of(name, tuple(p.shape)) for name, p in template.named_parameters()}
    return {key: str(getattr(template, key, None)) for key in full}, values


def test_the_same_weights_are_the_same_bytes(tmp_path):
    note = {"model": MODEL, "classes": list("abcde")}
    tensors = dict(create_model(**MODEL, seed=7).state_dict())
    contents = set()
    for number in range(12):  # with two metadata keys, safetensors writes them in either order
        write_weights(tmp_path / f"{number}.safetensors", tensors, note)
        contents.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(contents) == 1


def test_fine_tuning_goes_on_from_masked_patch_prediction(tmp_path):
    small = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}
    masked = settings(kind="masked_patch", init=None, model=small, data={"resolution": 16})
    model = resolve_model(masked, None, 3)
    assert (model["num_classes"], model["patch_target"]) == (0, "mean_color")
    trained = create_model(**model).state_dict()
    assert {"mask_token", "patch_head.weight"} < trained.keys()
    write_weights(tmp_path / "w.safetensors", trained, {"model": model, "classes": ["a", "b", "c"]})

    tuned = settings(init=str(tmp_path / "w.safetensors"), data={"resolution": 16})
    init = open_source(tuned.init)
    model = resolve_model(tuned, init, 5)
    assert (model["num_classes"], model.get("patch_target")) == (5, None)
    with torch.device("meta"):
        template = create_model(**model, seed=None)
    value_of = first_values(template, init, tuned)
    values = {name: value_of(name, tuple(p.shape)) for name, p in template.named_parameters()}
    assert not any(name.startswith(("mask_token", "patch_head")) for name in values)
    assert not values["head.weight"].any()
    assert all(values[name].equal(trained[name]) for name in values if not name.startswith("head."))
    features = init.build().features(torch.zeros(2, 3, 16, 16))  # few-shot needs no head
    assert features.shape == (2, 24)


def test_fine_tuning_goes_on_from_masked_autoencoding_and_may_learn_its_positions(tmp_path):
    small = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1, "position": "sincos_2d_moco"}
    decoder = {"decoder_depth": 1, "decoder_dim": 16, "decoder_heads": 2}
    stage = settings(kind="mae", init=None, model=small, mae=decoder, data={"resolution": 16})
    model = resolve_model(stage, None, 3)
    assert model == small | decoder | {"image_size": 16, "num_classes": 0, "representation": False}
    template = create_model(**model)
    trained = {name: value for name, value in template.state_dict().items() if not name.startswith("decoder.")}
    encoder = {key: value for key, value in model.items() if key not in decoder}  # as convert leaves it
    write_weights(tmp_path / "w.safetensors", trained, {"model": encoder, "classes": ["a", "b", "c"]})

    def begin(stage: TrainSettings) -> dict[str, torch.Tensor]:
        init = open_source(stage.init)
        template = create_model(**resolve_model(stage, init, 5), seed=None)
        value_of = first_values(template, init, stage)
        return {name: value_of(name, tuple(p.shape)) for name, p in template.named_parameters()}

    init = str(tmp_path / "w.safetensors")
    values = begin(settings(init=init))
    assert "pos_embed" not in values
    assert values.keys() - {"head.weight", "head.bias"} == trained.keys()
    assert all(values[name].equal(trained[name]) for name in trained)
    learned = begin(settings(init=init, model={"position": "learned"}))
    assert learned["pos_embed"].equal(interpolate_pos_embed(template.pos_embed, 4))
    again = begin(settings(kind="mae", init=init, mae=decoder, seed=3))
    assert again["blocks.0.mlp.fc1.weight"].equal(trained["blocks.0.mlp.fc1.weight"])
    assert not again["decoder.embed.weight"].equal(template.decoder.embed.weight)  # a decoder is always new
    with pytest.raises(UserError, match=r"its position is sincos_2d_moco, the settings say learned_2d"):
        begin(settings(init=init, model={"position": "learned_2d"}))
