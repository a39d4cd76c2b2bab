"""Conversion as a whole: round trips, changes of size, classes and dtype, the proof, the card, the command."""

import json
import struct

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.ndimage import zoom

from pipeline.convert import npz
from pipeline.convert.convert import convert
from pipeline.convert.places import at
from pipeline.convert.recognise import load_model, open_source
from pipeline.convert.source import Source
from pipeline.models import create_model
from shards.errors import PatchmillError, UserError
from tests.command import patchmill
from tests.pipeline.convert.made import TINY, randomized, save

VIT = {"name": "vit_ti16", **TINY}
HYBRID = {"name": "r50_vit_b16", **TINY, "patch_size": 1, "backbone": [1, 2], "backbone_width": 32}
BIT = {"name": "bit_r50x1", "image_size": 32, "units": [1, 2], "width": 32, "num_classes": 7}
OURS = {
    "axial": {**VIT, "name": "axial_vit_b16"},
    "relative": {**VIT, "position": "relative", "position_at": "every", "registers": 2},
    "patches": {**VIT, "patch_target": "mean_color", "num_classes": 0},
}
EVERYWHERE = {"vit": VIT, "mean": {**VIT, "pooling": "mean"}, "map": {**VIT, "pooling": "map"}, "hybrid": HYBRID}
EVERYWHERE |= {"bit": BIT, "head": {**VIT, "representation": True}, "mlp": {**VIT, "mlp_dim": 40}}


def saved(tmp_path, model: dict, **how):
    return save(randomized(**model), tmp_path / "ours.safetensors", model, **how)


PAIRS = [("safetensors", name) for name in OURS | EVERYWHERE] + [("npz", name) for name in EVERYWHERE]


@pytest.mark.parametrize(("to", "name"), [*PAIRS, ("transformers", "vit"), ("transformers", "mlp")])
def test_there_and_back_is_exact_to_the_bit(to, name, tmp_path):
    model = (OURS | EVERYWHERE)[name]
    file, there = saved(tmp_path, model), tmp_path / "there"
    convert(file, there, to)
    convert(there, tmp_path / "back.safetensors")
    before, after = load_file(file), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    made, again = (open_source(path).template() for path in (file, tmp_path / "back.safetensors"))
    for key in ("image_size", "num_heads", "gelu", "norm_eps", "pooling", "units", "representation"):
        assert getattr(made, key, None) == getattr(again, key, None)
    assert open_source(tmp_path / "back.safetensors").classes == [f"class {i}" for i in range(made.num_classes)]


def test_the_same_is_the_same_file(tmp_path):
    file = saved(tmp_path, VIT)
    for to in ("safetensors", "npz"):
        for i in (1, 2):
            convert(file, tmp_path / f"{i}.{to}", to)
        assert (tmp_path / f"1.{to}").read_bytes() == (tmp_path / f"2.{to}").read_bytes()


def test_to_another_resolution_by_the_official_zoom_or_as_timm(tmp_path):
    file = saved(tmp_path, VIT)
    table = load_file(file)["pos_embed"]
    grid = table[0, 1:].reshape(4, 4, 48)
    convert(file, tmp_path / "official.safetensors", image_size=56)
    found = open_source(tmp_path / "official.safetensors")
    assert found.model["image_size"] == 56
    assert found.tensor("pos_embed")[:, 0].equal(table[:, 0])
    expected = torch.from_numpy(zoom(grid.numpy(), (7 / 4, 7 / 4, 1), order=1)).reshape(49, 48)
    torch.testing.assert_close(found.tensor("pos_embed")[0, 1:], expected, rtol=0, atol=1e-5)
    convert(file, tmp_path / "bicubic.npz", "npz", image_size=56, resize="bicubic")
    expected = F.interpolate(grid.permute(2, 0, 1)[None], (7, 7), mode="bicubic", antialias=True)
    expected = expected[0].permute(1, 2, 0).reshape(49, 48)
    found = open_source(tmp_path / "bicubic.npz")
    assert found.build()(torch.zeros(1, 3, 56, 56)).shape == (1, 7)
    torch.testing.assert_close(found.tensor("pos_embed")[0, 1:], expected, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="image_size 30 is not divisible by patch_size 8; take 24 or 32"):
        convert(file, tmp_path / "x.safetensors", image_size=30)


def test_positions_of_other_kinds_at_another_resolution(tmp_path):
    for model, resize, message in (
        ({**VIT, "position": "learned_2d"}, "official", None),
        ({**VIT, "position": "sincos_2d"}, "bicubic", None),  # fixed: there is nothing to stretch
        ({**VIT, "position_at": "every"}, "bicubic", None),
        (BIT, "bicubic", None),
        ({**VIT, "position": "learned_2d"}, "bicubic", "bicubic does not suit position 'learned_2d'"),
        (OURS["relative"], "official", "cannot go to 8 x 8"),
    ):
        file = saved(tmp_path, model)
        if message:
            with pytest.raises(UserError, match=message):
                convert(file, tmp_path / "large.safetensors", image_size=64, resize=resize)
        else:
            convert(file, tmp_path / "large.safetensors", image_size=64, resize=resize)
            assert load_model(tmp_path / "large.safetensors")[0](torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_classes(tmp_path):
    file = saved(tmp_path, {**VIT, "representation": True})
    trained = load_file(file)
    (tmp_path / "seven").write_text("a\nb\nc\nd\ne\nf\ng\n")
    (tmp_path / "two").write_text("cat\ndog\n")

    def after(classes: str) -> Source:
        convert(file, tmp_path / "w.safetensors", classes=classes)
        return open_source(tmp_path / "w.safetensors")

    assert (after("7").model["num_classes"], after("7").classes[0]) == (7, "class 0")
    assert after("7").tensor("head.weight").equal(trained["head.weight"])
    named = after(str(tmp_path / "seven"))
    assert named.classes == list("abcdefg")
    assert named.tensor("head.weight").equal(trained["head.weight"])
    new = after(str(tmp_path / "two"))
    assert new.classes == ["cat", "dog"]
    assert not new.model.get("representation")
    assert new.tensor("head.weight").shape == (2, 48)
    assert not new.tensor("head.weight").any()
    assert not [name for name in new.parameters() if name.startswith("pre_logits")]
    none = after("0")
    assert none.tensor("pre_logits.fc.weight").equal(trained["pre_logits.fc.weight"])
    assert not [name for name in none.parameters() if name.startswith("head.")]
    with pytest.raises(UserError, match="--classes 'many' is no number, and there is no such file of names"):
        after("many")
    patches = saved(tmp_path, OURS["patches"])
    convert(patches, tmp_path / "encoder.npz", "npz", classes="0")
    assert "patch_target" not in open_source(tmp_path / "encoder.npz").model


def test_dtypes(tmp_path):
    file = saved(tmp_path, VIT)
    for dtype, kind in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        for to, where in (("safetensors", "w"), ("npz", "w.npz"), ("transformers", "folder")):
            done = convert(file, tmp_path / dtype / where, to, dtype=dtype)
            assert 0 < done["proof"]["largest_difference_of_logits"] < 0.1
            assert open_source(tmp_path / dtype / where).tensor("norm.weight").dtype == kind
    model = randomized(**VIT)
    with torch.no_grad():
        model.head.bias[0] = 1e5
    save(model, file, VIT)
    with pytest.raises(UserError, match=r"weights as large as 1e\+05 do not go into float16; take bfloat16"):
        convert(file, tmp_path / "half.npz", "npz", dtype="float16")
    assert not (tmp_path / "half.npz").exists()


def test_the_proof_is_printed_and_noted(tmp_path):
    file = saved(tmp_path, VIT)
    for to, where in (("safetensors", "w.safetensors"), ("npz", "w.npz"), ("transformers", "folder")):
        done = convert(file, tmp_path / where, to)
        assert done["proof"]["largest_difference_of_logits"] == 0
        assert done["proof"]["largest_logits"] > 0.1
        assert open_source(tmp_path / where).note["proof"] == done["proof"]
    with safe_open(tmp_path / "folder/model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"


@pytest.mark.parametrize("wrong", ["turned", "swapped", "head"])
def test_a_conversion_that_is_wrong_does_not_pass(wrong, tmp_path, monkeypatch):
    """What the writer does wrong, and the reader does not, or in a head of zeros."""
    right = npz._places

    def places(source, old, **how):
        made = right(source, old, **how)
        if how.get("table") and "patch_embed.proj.weight" in made and not reading:
            name = "blocks.1.attn.proj.weight" if wrong == "turned" else "blocks.1.norm1.weight"
            if wrong == "turned":
                made[name] = at(*made[name].names, theirs=lambda value: made_turned(value))
            else:
                made[name], made["blocks.1.norm2.weight"] = made["blocks.1.norm2.weight"], made[name]
        return made

    def made_turned(value):
        return value.unflatten(0, (3, -1))

    reading = []
    model = randomized(**VIT)
    if wrong == "head":  # which says the same whatever is before it
        torch.nn.init.zeros_(model.head.weight)
    file = save(model, tmp_path / "ours.safetensors", VIT)
    monkeypatch.setattr(npz, "_places", places)
    vit = npz._vit
    monkeypatch.setattr(npz, "_vit", lambda *arguments: (reading.append(1), vit(*arguments))[1])
    with pytest.raises(
        PatchmillError, match=r"the converted model is another one: of its (logits|features), .* differ"
    ):
        convert(file, tmp_path / "w.npz", "npz")
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors"}


def test_a_model_that_diverged_is_not_converted(tmp_path):
    model = randomized(**VIT)
    with torch.no_grad():
        model.norm.bias[3] = float("nan")
    save(model, tmp_path / "ours.safetensors", VIT)
    with pytest.raises(UserError, match="the safetensors gives logits that are no numbers"):
        convert(tmp_path / "ours.safetensors", tmp_path / "w.npz", "npz")
    assert not (tmp_path / "w.npz").exists()


def test_a_header_has_the_length_it_says_and_what_is_noted_may_grow(tmp_path):
    file = saved(tmp_path, VIT)
    convert(file, tmp_path / "w.safetensors")
    with open(tmp_path / "w.safetensors", "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    assert length % 8 == 0
    assert "proof" in header["__metadata__"]["patchmill"]
    ends = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert (tmp_path / "w.safetensors").stat().st_size == 8 + length + ends[-1][1]


def test_unknown_and_damaged_sources_are_one_line(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not safetensors")
    (tmp_path / "w.bin").write_bytes(b"\x80\x02nothing")
    (tmp_path / "empty").mkdir()
    torch.save({"state_dict": {"fc1.weight": torch.zeros(2, 2)}}, tmp_path / "other.pth")
    for path, message in (
        ("gone", "there is no .*gone; give a checkpoint"),
        ("empty", "no whole latest checkpoint in .*empty, nor other weights"),
        ("w.safetensors", "is no readable safetensors file"),
        ("w.bin", "cannot be read|holds more than tensors"),
        ("other.pth", "has tensors such as fc1.weight, which no known format has"),
    ):
        with pytest.raises(UserError, match=message) as error:
            open_source(tmp_path / path)
        assert "\n" not in str(error.value)
    file = saved(tmp_path, VIT)
    with pytest.raises(UserError, match="there is no format 'onnx'; the formats are: safetensors, transformers, npz"):
        convert(file, tmp_path / "x", "onnx")
    with pytest.raises(UserError, match=r"unknown setting num_head in --set \(did you mean 'num_heads'"):
        convert(file, tmp_path / "x", given=["num_head=3"])
    with pytest.raises(UserError, match="holds one set of weights"):
        convert(file, tmp_path / "x", ema=True)
    with pytest.raises(UserError, match="is a folder; give the file to write"):
        convert(file, tmp_path / "empty")


def test_no_weights_appear_without_their_card(tmp_path):
    file = saved(tmp_path, VIT)
    (tmp_path / ".out.README.md.partial").mkdir()  # where the card is written first
    with pytest.raises(IsADirectoryError):
        convert(file, tmp_path / "out.safetensors")
    assert not list(tmp_path.glob("*out.safetensors*"))


def test_the_command_and_the_card(tmp_path):
    saved(tmp_path, VIT)
    changes = (
        "--set",
        "gelu=exact",
        "--image-size",
        "64",
        "--resize",
        "bicubic",
        "--classes",
        "3",
        "--dtype",
        "bfloat16",
    )
    to = ("vit", "--to", "transformers")
    done = patchmill("convert", "ours.safetensors", *to, *changes, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["proof"]["dtype"] == "bfloat16"
    assert told["card"] == "vit/README.md"
    config = json.loads((tmp_path / "vit/config.json").read_text())
    assert (config["image_size"], config["hidden_act"], len(config["id2label"])) == (64, "gelu", 3)
    card = (tmp_path / "vit/README.md").read_text()
    assert f"{told['parameters']:,} parameters" in card
    assert "Changed since the training: image size, 32 to 64 pixels, bicubic; head, 7 classes to 3." in card
    assert 'ViTForImageClassification.from_pretrained("vit")' in card


def test_weights_begin_another_training_whatever_wrote_them(tmp_path):
    """What came from elsewhere is as good as our own: its settings are all there."""
    model = randomized(**{**VIT, "norm_eps": 1e-5, "gelu": "exact"})
    file = save(model, tmp_path / "ours.safetensors", {**VIT, "norm_eps": 1e-5, "gelu": "exact"})
    convert(file, tmp_path / "folder", "transformers")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    found = open_source(tmp_path / "back.safetensors")
    made = create_model(**found.model)
    assert open_source(tmp_path / "folder").model == found.model
    assert (made.norm_eps, made.norm.eps, made.blocks[0].norm1.eps, made.gelu) == (1e-5, 1e-5, 1e-5, "exact")
