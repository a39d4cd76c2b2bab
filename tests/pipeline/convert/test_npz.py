"""Official .npz files, made here with their own names, against their own arithmetic, and both ways."""

import zipfile
import zlib

import numpy as np
import pytest
import torch

from pipeline.convert.convert import convert
from pipeline.convert.recognise import open_source
from pipeline.models import create_model
from shards.errors import UserError
from tests.pipeline.convert import official
from tests.pipeline.convert.made import TINY, randomized, save

TINY_VIT = {"d": 48, "depth": 2, "heads": 3, "m": 96, "patch": 8, "tokens": 17, "k": 7}
TINY_HYBRID = TINY_VIT | {"patch": 1, "units": [1, 2], "width": 32}
FILES = {
    "vit": official.vit(**TINY_VIT),
    "vit with pre-logits": official.vit(**TINY_VIT, pre_logits=True),
    "vit without class token": official.vit(**TINY_VIT | {"tokens": 16}, cls=False),
    "hybrid": official.vit(**TINY_HYBRID),
    "root alone": official.vit(**TINY_VIT | {"units": [], "width": 32, "tokens": 2}),
    "bit": official.bit([1, 2, 1], 32, 7),
}


def logits_of(model: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model.double()(torch.from_numpy(image).double()[None])[0].numpy()


def picture(side: int = 32) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (3, side, side)).astype(np.float32)


def options(name: str) -> list[str]:
    return ["image_size=32"] if name == "bit" else []


def expected(name: str, image: np.ndarray, arrays: official.Arrays | None = None) -> np.ndarray:
    arrays = FILES[name] if arrays is None else arrays
    return official.bit_logits(arrays, image) if name == "bit" else official.vit_logits(arrays, image)


@pytest.mark.parametrize("name", FILES)
def test_official_files_convert_both_ways_to_the_bit(name, tmp_path):
    np.savez(tmp_path / "official.npz", **FILES[name])
    done = convert(tmp_path / "official.npz", tmp_path / "ours.safetensors", given=options(name))
    assert done["parameters"] == sum(value.size for value in FILES[name].values())
    ours = open_source(tmp_path / "ours.safetensors").build()
    image = picture(ours.image_size)
    want = expected(name, image)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(logits_of(ours, image), want, rtol=0, atol=1e-10 * np.abs(want).max())
    convert(tmp_path / "ours.safetensors", tmp_path / "again.npz", "npz")
    with np.load(tmp_path / "again.npz", allow_pickle=False) as again:
        assert set(again.files) == set(FILES[name])
        for key, value in FILES[name].items():
            assert again[key].dtype == value.dtype
            assert again[key].shape == value.shape
            assert again[key].tobytes() == value.tobytes(), key


def variant(kind: str) -> official.Arrays:
    """Return what the file of a ViT becomes under other names, all of them of the same model."""
    mha, second, mlp = official.OLD
    plain = dict(FILES["vit"])
    linen = {
        name.replace(mha, official.NEW[0]).replace(second, official.NEW[1]).replace(mlp, official.NEW[2]): value
        for name, value in plain.items()
    }
    if kind == "linen names":
        return linen
    if kind == "of a run":
        run = {f"opt/target/{name}": value for name, value in plain.items()}
        return run | {"opt/state/step": np.array(3), "opt/state/param_states/cls/grad_ema": plain["cls"]}
    if kind == "positions in the encoder":
        linen["Transformer/pos_embedding"] = linen.pop("Transformer/posembed_input/pos_embedding")
        return linen
    # big_vision: the class token is put before the patches after they got their positions.
    positions = linen.pop("Transformer/posembed_input/pos_embedding")
    linen |= {"pos_embedding": positions[:, 1:], "cls": linen["cls"] + positions[:, :1]}
    if kind == "big_vision":
        return {f"params/{name}": value for name, value in linen.items()}
    assert kind == "scan"
    stacked: official.Arrays = {name: value for name, value in linen.items() if "encoderblock_" not in name}
    for name in linen:
        if "encoderblock_0/" in name:
            both = [linen[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in (0, 1)]
            stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(both)
    return {f"params/img/{name}": value for name, value in stacked.items()}


@pytest.mark.parametrize("kind", ["linen names", "of a run", "positions in the encoder", "big_vision", "scan"])
@pytest.mark.parametrize("packed", [False, True])
def test_other_names_are_the_same_model(kind, packed, tmp_path):
    arrays = variant(kind)
    (np.savez_compressed if packed else np.savez)(tmp_path / "other.npz", **arrays)
    found = open_source(tmp_path / "other.npz").build()
    image = picture()
    np.testing.assert_allclose(logits_of(found, image), expected("vit", image), rtol=0, atol=1e-6)


def test_kernels_that_lie_in_the_order_of_columns_are_read_as_they_are(tmp_path):
    np.savez(tmp_path / "other.npz", **{name: np.asfortranarray(value) for name, value in FILES["hybrid"].items()})
    image = picture()
    found = open_source(tmp_path / "other.npz").build()
    np.testing.assert_allclose(logits_of(found, image), expected("hybrid", image), rtol=0, atol=1e-6)


def test_group_norms_of_new_files_are_lines(tmp_path):
    arrays = {name: value.reshape(-1) if "gn" in name else value for name, value in FILES["hybrid"].items()}
    np.savez(tmp_path / "new.npz", **arrays)
    image = picture()
    found = open_source(tmp_path / "new.npz").build()
    np.testing.assert_allclose(logits_of(found, image), expected("hybrid", image), rtol=0, atol=1e-6)


def test_bits_names_with_numbers_and_big_visions(tmp_path):
    image, plain = picture(), FILES["bit"]
    numbered = {}
    for i, (name, value) in enumerate(plain.items()):
        numbered[name.replace("standardized_conv2d/", f"standardized_conv2d_{i}/") if i % 2 else name] = value
    np.savez(tmp_path / "numbered.npz", **numbered)
    flax = {}
    for name, value in plain.items():
        name = name.removeprefix("resnet/")
        for part, number in zip("abc", "123", strict=True):
            name = name.replace(f"/{part}/standardized_conv2d", f"/conv{number}").replace(
                f"/{part}/group_norm", f"/gn{number}"
            )
        name = name.replace("a/proj/standardized_conv2d", "conv_proj").replace("gamma", "scale").replace("beta", "bias")
        name = name.replace("root_block/standardized_conv2d", "root_block/conv_root").replace("head/conv2d", "head")
        name = name.replace("group_norm/", "norm-pre-head/")
        value = value[0, 0] if name == "head/kernel" else value
        flax[f"params/{name}"] = value[None, None, None] if name.endswith(("scale",)) or "gn" in name else value
        if name == "norm-pre-head/bias":
            flax[f"params/{name}"] = value[None, None, None]
    np.savez(tmp_path / "flax.npz", **flax)
    for file in ("numbered.npz", "flax.npz"):
        found = open_source(tmp_path / file, given={"image_size": 32}).build()
        want = expected("bit", image)
        np.testing.assert_allclose(logits_of(found, image), want, rtol=0, atol=1e-10 * np.abs(want).max())
    with pytest.raises(UserError, match=r"does not tell the size of its images; say it with --set image_size"):
        open_source(tmp_path / "flax.npz")


def test_a_map_head_is_written_and_read_under_big_visions_names(tmp_path):
    model = randomized(name="vit_ti16", **TINY, pooling="map")
    save(model, tmp_path / "ours.safetensors", {"name": "vit_ti16", **TINY, "pooling": "map"})
    convert(tmp_path / "ours.safetensors", tmp_path / "map.npz", "npz")
    with np.load(tmp_path / "map.npz") as arrays:
        assert arrays["params/MAPHead_0/probe"].shape == (1, 1, 48)
        assert arrays["params/MAPHead_0/MultiHeadDotProductAttention_0/query/kernel"].shape == (48, 3, 16)
        assert arrays["params/pos_embedding"].shape == (1, 16, 48)
        inlined = {name.replace("MAPHead_0/", ""): value for name, value in arrays.items()}  # as it once was
    np.savez(tmp_path / "inlined.npz", **inlined)
    for file in ("map.npz", "inlined.npz"):
        found = open_source(tmp_path / file)
        assert found.model["pooling"] == "map"
        for name, parameter in model.named_parameters():
            assert found.tensor(name).equal(parameter), name


def test_fixed_positions_of_big_vision_are_asked_for(tmp_path):
    arrays = variant("big_vision")
    del arrays["params/pos_embedding"]
    np.savez(tmp_path / "fixed.npz", **arrays)
    with pytest.raises(UserError, match="what position embeddings it has; say it with --set position=sincos_2d"):
        open_source(tmp_path / "fixed.npz")
    found = open_source(tmp_path / "fixed.npz", given={"position": "sincos_2d", "image_size": 32})
    assert found.build().pos_embed.shape == (1, 17, 48)


def test_bfloat16_is_kept_as_void_and_known(tmp_path):
    model = {"name": "vit_ti16", **TINY}
    made = randomized(**model)
    save(made, tmp_path / "ours.safetensors", model)
    convert(tmp_path / "ours.safetensors", tmp_path / "half.npz", "npz", dtype="bfloat16")
    with np.load(tmp_path / "half.npz", allow_pickle=False) as arrays:
        assert arrays["cls"].dtype == np.dtype("V2")
    found = open_source(tmp_path / "half.npz")
    for name, parameter in made.named_parameters():
        assert found.tensor(name).equal(parameter.detach().bfloat16()), name


@pytest.mark.parametrize("comment", [b"x: made by hand", zlib.compress(b"[1]"), zlib.compress(b"\xff"), b"\x78\x9c"])
def test_comments_of_others_are_none_of_ours(comment, tmp_path):
    np.savez(tmp_path / "a.npz", **FILES["vit"])
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.comment = comment
    assert open_source(tmp_path / "a.npz", given={"num_heads": 3}).tensor("head.bias").shape == (7,)


def test_nothing_is_unpickled(tmp_path):
    arrays = FILES["vit"] | {"cls": np.array([print], dtype=object)}
    np.savez(tmp_path / "evil.npz", **arrays)
    with pytest.raises(UserError, match=r"cls of .*evil\.npz is pickled, and nothing is unpickled"):
        open_source(tmp_path / "evil.npz")


def test_other_architectures_and_lacking_parts_are_named(tmp_path):
    np.savez(tmp_path / "more.npz", **FILES["vit"] | {"extra/kernel": np.zeros((2, 3), np.float32)})
    with pytest.raises(UserError, match=r"1 tensors that no model here has a place for, such as extra/kernel \[2, 3\]"):
        open_source(tmp_path / "more.npz")
    less = {name: value for name, value in FILES["vit"].items() if "encoder_norm/scale" not in name}
    np.savez(tmp_path / "less.npz", **less)
    with pytest.raises(UserError, match=r"has no Transformer/encoder_norm/scale, which would be norm\.weight"):
        open_source(tmp_path / "less.npz")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w") as archive:
        archive.writestr("a.npy", b"no array")
    with pytest.raises(UserError, match=r"a of .*empty\.npz is no NumPy array"):
        open_source(tmp_path / "empty.npz")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"gelu": "exact"}, "no place for the exact GELU"),
        ({"norm_eps": 1e-12}, "no place for layer norms with epsilon 1e-12"),
        ({"qkv_bias": False}, "no place for queries, keys and values without biases"),
        ({"registers": 2}, "no place for registers"),
        ({"position": "relative", "position_at": "shared"}, "no place for positions inside the blocks"),
        ({"position_at": "every"}, "no place for positions inside the blocks"),
        ({"patch_target": "mean_color", "num_classes": 0}, "no place for a head on every patch"),
        ({"name": "axial_vit_b16"}, "no place for a AxialTransformer"),
    ],
)
def test_what_the_official_code_lacks_is_refused_by_name(change, what, tmp_path):
    model = {"name": "vit_ti16", **TINY} | change
    save(create_model(**model), tmp_path / "ours.safetensors", model)
    with pytest.raises(UserError, match=what):
        convert(tmp_path / "ours.safetensors", tmp_path / "official.npz", "npz")
    assert {path.name for path in tmp_path.iterdir()} == {"ours.safetensors"}


PAPER = {
    "ViT-B_16": official.vit_shapes(768, 12, 12, 3072, 16, 197, 1000, pre_logits=True),
    "R50+ViT-B_16": official.vit_shapes(768, 12, 12, 3072, 1, 197, 1000, units=[3, 4, 9]),
    "BiT-M-R50x1": official.bit_shapes([3, 4, 6, 3], 64, 1000),
}
COUNTS = {"ViT-B_16": 87_158_248, "R50+ViT-B_16": 98_659_112, "BiT-M-R50x1": 25_549_352}


def test_the_shapes_of_the_papers_files():
    for name, shapes in PAPER.items():
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == COUNTS[name]
    assert len(PAPER["BiT-M-R50x1"]) == 153


@pytest.mark.slow
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_files_convert_both_ways(name, tmp_path):
    draw = np.random.default_rng(0)
    arrays = {key: draw.standard_normal(shape, np.float32) * np.float32(0.05) for key, shape in PAPER[name].items()}
    np.savez(tmp_path / "official.npz", **arrays)
    given = ["image_size=224"] if "BiT" in name else []
    done = convert(tmp_path / "official.npz", tmp_path / "ours.safetensors", given=given)
    assert done["parameters"] == COUNTS[name]
    wanted = {"ViT-B_16": "vit_b16", "R50+ViT-B_16": "r50_vit_b16", "BiT-M-R50x1": "bit_r50x1"}[name]
    found = open_source(tmp_path / "ours.safetensors").model
    pre = {"representation": True} if name == "ViT-B_16" else {}
    assert found == {"name": wanted, "image_size": 224, "num_classes": 1000} | pre
    image = picture(224)
    ours = open_source(tmp_path / "ours.safetensors").build()
    want = official.bit_logits(arrays, image) if "BiT" in name else official.vit_logits(arrays, image)
    np.testing.assert_allclose(logits_of(ours, image), want, rtol=0, atol=1e-9 * np.abs(want).max())
    convert(tmp_path / "ours.safetensors", tmp_path / "again.npz", "npz")
    with np.load(tmp_path / "again.npz", allow_pickle=False) as again:
        assert set(again.files) == set(arrays)
        assert all(again[key].tobytes() == value.tobytes() for key, value in arrays.items())
