"""Folders for transformers, opened by it; and its own, opened here."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.convert.convert import convert
from pipeline.convert.recognise import open_source
from shards.errors import UserError
from tests.pipeline.convert.made import TINY, randomized, save

transformers = pytest.importorskip("transformers")

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
# Names of files of transformers 4.x, and of what 5.x saves.
LAYER = [
    "attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense",
    "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after",
]  # fmt: skip
NAMES = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
NAMES |= {
    f"{layer}.{what}"
    for layer in ["vit.embeddings.patch_embeddings.projection", "vit.layernorm", "classifier"]
    + [f"vit.encoder.layer.{i}.{part}" for i in range(3) for part in LAYER]
    for what in ("weight", "bias")
}


def theirs(kind: str = "ViTForImageClassification", **over) -> torch.nn.Module:
    """Return a model of transformers whose every parameter is random."""
    settings = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 64}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=7, **settings | over)
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return model


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"gelu": "exact", "norm_eps": 1e-12},
        {"qkv_bias": False, "mlp_dim": 40},
        {"position": "sincos_2d"},
        {"position": "learned_2d"},
        {"position": "none"},
    ],
)
def test_transformers_gives_our_logits(over, tmp_path):
    model = {"name": "vit_ti16", **TINY} | over
    ours = randomized(**model)
    done = convert(save(ours, tmp_path / "ours.safetensors", model), tmp_path / "folder", "transformers")
    opened, report = transformers.ViTForImageClassification.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(opened.eval()(IMAGES).logits, ours(IMAGES), rtol=0, atol=1e-5)
    assert opened.config.id2label[3] == "class 3"
    assert done["proof"]["largest_difference_of_logits"] == 0
    again = open_source(tmp_path / "folder")
    kept = {key: value for key, value in model.items() if key not in ("name", "position")}
    assert kept.items() <= (kept | again.model).items()
    assert again.classes == [f"class {i}" for i in range(7)]
    for name, parameter in ours.named_parameters():
        if name != "pos_embed" or model.get("position", "learned") == "learned":
            assert again.tensor(name).equal(parameter), name


def test_names_are_those_of_files_of_4_and_5(tmp_path):
    model = {"name": "vit_ti16", **TINY}
    convert(save(randomized(**model), tmp_path / "ours.safetensors", model), tmp_path / "folder", "transformers")
    assert load_file(tmp_path / "folder/model.safetensors").keys() == NAMES
    theirs().save_pretrained(tmp_path / "theirs")
    assert load_file(tmp_path / "theirs/model.safetensors").keys() == NAMES


def test_the_preprocessor_gives_what_we_train_on(tmp_path):
    model = {"name": "vit_ti16", **TINY}
    convert(save(randomized(**model), tmp_path / "ours.safetensors", model), tmp_path / "folder", "transformers")
    processor = transformers.ViTImageProcessor.from_pretrained(tmp_path / "folder")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    values = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(values, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
    large = processor(Image.fromarray(pixels).resize((80, 50)), return_tensors="np")["pixel_values"]
    assert large.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("over", [{}, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}, {"qkv_bias": False}])
@pytest.mark.parametrize("how", ["file", "cut", "in memory", "bin"])
def test_theirs_are_read_with_their_logits(over, how, tmp_path):
    model = theirs(**over)
    model.save_pretrained(tmp_path, **({"max_shard_size": "30KB"} if how == "cut" else {}))
    if how == "cut":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
    elif how == "in memory":
        save_file(model.state_dict(), tmp_path / "model.safetensors")
        assert "vit.layers.0.attention.q_proj.weight" in model.state_dict() or transformers.__version__ < "5"
    elif how == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    with torch.no_grad():
        torch.testing.assert_close(open_source(tmp_path).build()(IMAGES), model(IMAGES).logits, rtol=0, atol=1e-5)


def test_the_pooler_is_the_layer_before_the_head(tmp_path):
    model = {"name": "vit_ti16", **TINY, "representation": True}
    ours = randomized(**model)
    file = save(ours, tmp_path / "ours.safetensors", model)
    with pytest.raises(UserError, match=r"no place for a tanh layer before the head .* --classes 0"):
        convert(file, tmp_path / "folder", "transformers")
    convert(file, tmp_path / "folder", "transformers", classes="0")
    opened = transformers.ViTModel.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        torch.testing.assert_close(opened(IMAGES).pooler_output, ours(IMAGES, features=True), rtol=0, atol=1e-5)
    again = open_source(tmp_path / "folder")
    assert (again.model["num_classes"], again.model["representation"]) == (0, True)
    assert again.tensor("pre_logits.fc.weight").equal(ours.pre_logits.fc.weight)


def test_of_masked_image_modelling_the_decoder_is_left_behind(tmp_path, capsys):
    model = theirs("ViTForMaskedImageModeling", encoder_stride=8)
    model.save_pretrained(tmp_path)
    ours = open_source(tmp_path).build()
    assert "left behind, as no part of the model: 3 tensors, such as decoder.0.bias" in capsys.readouterr().err
    with torch.no_grad():
        expected = model.vit(IMAGES).last_hidden_state[:, 0]
        torch.testing.assert_close(ours(IMAGES), expected, rtol=0, atol=1e-5)


def test_a_pooler_beside_a_classifier_is_left_behind_as_transformers_does_not_ask_it(tmp_path, capsys):
    model = theirs()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    pooler = {"vit.pooler.dense.weight": torch.ones(48, 48), "vit.pooler.dense.bias": torch.ones(48)}
    save_file(load_file(file) | pooler, file, {"format": "pt"})
    with torch.no_grad():
        again = transformers.ViTForImageClassification.from_pretrained(tmp_path).eval()(IMAGES).logits
        torch.testing.assert_close(again, model(IMAGES).logits, rtol=0, atol=0)
        torch.testing.assert_close(open_source(tmp_path).build()(IMAGES), again, rtol=0, atol=1e-5)
    assert "left behind, as no part of the model: 2 tensors, such as vit.pooler" in capsys.readouterr().err
    assert open_source(tmp_path, given={"representation": True}).template().representation


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"backbone": [1, 1], "backbone_width": 32, "patch_size": 1}, "no place for a hybrid"),
        ({"pooling": "mean"}, "no place for pooling 'mean'"),
        ({"pooling": "map"}, "no place for pooling 'map'"),
        ({"registers": 1}, "no place for registers"),
        ({"position_at": "every"}, "no place for positions inside the blocks"),
        ({"name": "axial_vit_b16"}, "no place for a AxialTransformer"),
    ],
)
def test_what_it_lacks_is_refused_by_name(change, what, tmp_path):
    model = {"name": "vit_ti16", **TINY} | change
    file = save(randomized(**model), tmp_path / "ours.safetensors", model)
    with pytest.raises(UserError, match=what):
        convert(file, tmp_path / "folder", "transformers")
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors"}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "deit"}, "a model of type 'deit' of transformers; of its models only 'vit' is taken"),
        ({"hidden_act": "relu"}, "has the activation 'relu'"),
        ({"hidden_act": ["gelu"]}, "is laid out otherwise than its names make believe"),
        ({"image_size": "32"}, "image_size of vit_ti8 is '32', of another type than it takes"),
        ({"id2label": ["a"]}, "is laid out otherwise than its names make believe"),
        ({"num_attention_heads": 5}, "embed_dim 48 is not divisible by num_heads 5"),
    ],
)
def test_other_models_of_theirs_are_refused(config, what, tmp_path):
    theirs().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    with pytest.raises(UserError, match=what):
        open_source(tmp_path).build()


def test_without_a_config_heads_are_asked_for(tmp_path):
    save_file(theirs().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="how many attention heads a width of 48 has; say it with --set num_heads=N"):
        open_source(tmp_path / "model.safetensors")
    assert open_source(tmp_path / "model.safetensors", given={"num_heads": 3}).model["norm_eps"] == 1e-12


def test_another_folder_is_not_overwritten(tmp_path):
    model = {"name": "vit_ti16", **TINY}
    file = save(randomized(**model), tmp_path / "ours.safetensors", model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"mine has thesis\.tex, which no conversion wrote"):
        convert(file, tmp_path / "mine", "transformers")
    theirs().save_pretrained(tmp_path / "theirs")  # of the same names
    (tmp_path / "theirs" / "README.md").write_text("years of work")
    with pytest.raises(UserError, match=r"theirs has README\.md, which no conversion wrote"):
        convert(file, tmp_path / "theirs", "transformers")
    assert (tmp_path / "theirs" / "README.md").read_text() == "years of work"
    (tmp_path / "mine.README.md").write_text("years of work")
    with pytest.raises(UserError, match=r"mine\.README\.md, where the card goes, is there, and no conversion wrote it"):
        convert(file, tmp_path / "mine.npz", "npz")
    assert not (tmp_path / "mine.npz").exists()
    for _ in range(2):
        convert(file, tmp_path / "other.npz", "npz")
    for _ in range(2):  # its own is
        convert(file, tmp_path / "folder", "transformers")
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
