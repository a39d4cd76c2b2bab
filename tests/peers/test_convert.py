"""What we export opens in timm and transformers 4, what they and torchvision save converts, with the same logits."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.convert.card import timm_settings
from pipeline.convert.change import bicubic
from pipeline.convert.convert import convert
from pipeline.convert.recognise import open_source
from pipeline.models.positions import Positions
from tests.pipeline.convert.made import TINY, randomized, save

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers/bin/python"


def ask(folder: Path, images: torch.Tensor, **request: str) -> torch.Tensor:
    """Return the logits of what ``foreign_models.py`` made or opened."""
    assert PYTHON.exists(), "there is no .venv-peers; make it with `make peers`"
    save_file({"images": images}, folder / "images.safetensors")
    request |= {"images": str(folder / "images.safetensors"), "logits": str(folder / "logits.safetensors")}
    (folder / "request.json").write_text(json.dumps(request))
    command = [PYTHON, ROOT / "tests/peers/foreign_models.py", folder / "request.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(folder / "logits.safetensors")["logits"]


def pictures(side: int) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


SMALL = "img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7"
SAME = {"given": ["num_heads=3"]}


@pytest.mark.parametrize(
    ("make", "arguments", "how"),
    [
        ("timm.VisionTransformer", SMALL, SAME),
        ("timm.VisionTransformer", f"{SMALL}, act_layer='gelu_tanh'", {"given": ["num_heads=3", "gelu=tanh"]}),
        ("timm.VisionTransformer", f"{SMALL}, reg_tokens=4", SAME),
        ("timm.VisionTransformer", f"{SMALL}, reg_tokens=4, no_embed_class=True", SAME),
        ("timm.VisionTransformer", f"{SMALL}, no_embed_class=True", SAME),
        ("timm.VisionTransformer", f"{SMALL}, global_pool='avg', class_token=False, fc_norm=False", SAME),
        ("timm.VisionTransformer", f"{SMALL}, global_pool='map', class_token=False, reg_tokens=2", SAME),
        ("timm.VisionTransformer", f"{SMALL}, pos_embed='none'", {"given": ["num_heads=3", "image_size=32"]}),
        ("timm.VisionTransformer", f"{SMALL}, qkv_bias=False, mlp_ratio=3", SAME),
        ("timm.vit_tiny_patch16_224", "depth=2, num_classes=7", {}),
        ("torchvision.", "image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96", SAME),
        (
            "torchvision.",
            "image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, representation_size=48",
            SAME,
        ),
    ],
)
def test_theirs_convert_with_their_logits(make, arguments, how, tmp_path):
    images = pictures(224 if "224" in make else 32)
    file = "w.pth" if make == "torchvision." else "w.safetensors"
    expected = ask(tmp_path, images, make=make, arguments=arguments, save=str(tmp_path / file))
    convert(tmp_path / file, tmp_path / "ours.safetensors", **how)
    with torch.no_grad():
        found = open_source(tmp_path / "ours.safetensors").build()(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def test_timms_checkpoint_of_a_training_and_its_average(tmp_path):
    images, file = pictures(32), tmp_path / "last.pth.tar"
    expected = ask(tmp_path, images, make="timm.VisionTransformer", arguments=SMALL, save=str(file))
    convert(file, tmp_path / "average.safetensors", ema=True, given=["num_heads=3"])
    convert(file, tmp_path / "last.safetensors", given=["num_heads=3"])
    average, last = (open_source(tmp_path / f"{name}.safetensors") for name in ("average", "last"))
    with torch.no_grad():
        torch.testing.assert_close(average.build()(images), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert last.tensor("cls_token").equal(average.tensor("cls_token") + 1)


@pytest.mark.parametrize(
    ("to", "over"),
    [
        *((to, over) for to in ("safetensors", "npz") for over in ({}, {"pooling": "mean"}, {"pooling": "map"})),
        ("safetensors", {"gelu": "exact", "qkv_bias": False}),
        ("safetensors", {"position": "none", "mlp_dim": 96}),
    ],
)
def test_timm_opens_ours_with_our_logits(to, over, tmp_path):
    model, images = {"name": "vit_ti16", **TINY} | over, pictures(32)
    ours = randomized(**model)
    convert(save(ours, tmp_path / "ours.safetensors", model), tmp_path / f"theirs.{to}", to)
    request = {"make": "timm.VisionTransformer", "arguments": timm_settings(ours), "state": str(tmp_path / "state")}
    found = ask(tmp_path, images, open=str(tmp_path / f"theirs.{to}"), **request)
    with torch.no_grad():
        torch.testing.assert_close(found, ours(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "theirs", "over"),
    [
        ("r50_vit_b16", "vit_base_r50_s16_224", {"depth": 1}),
        ("r26_vit_s32", "vit_small_r26_s32_224", {"depth": 1}),
        ("r_vit_ti16", "vit_tiny_r_s16_p8_224", {"depth": 1}),
        ("bit_r50x1", "resnetv2_50x1_bit", {}),
    ],
)
def test_timm_reads_our_npz_of_hybrids_and_bit_to_the_bit(name, theirs, over, tmp_path):
    model = {"name": name, "num_classes": 7, "image_size": 224} | over
    ours = randomized(**model)
    convert(save(ours, tmp_path / "ours.safetensors", model), tmp_path / "theirs.npz", "npz")
    arguments = ", ".join(f"{key}={value}" for key, value in {"num_classes": 7, **over}.items())
    request = {"make": f"timm.{theirs}", "arguments": arguments, "state": str(tmp_path / "state")}
    ask(tmp_path, pictures(224), open=str(tmp_path / "theirs.npz"), **request)
    state = load_file(tmp_path / "state")
    assert state.keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert state[key].equal(value), key


@pytest.mark.parametrize(
    "over", [{}, {"gelu": "exact", "norm_eps": 1e-12}, {"qkv_bias": False, "mlp_dim": 40}, {"position": "sincos_2d"}]
)
def test_transformers_4_opens_ours_with_our_logits(over, tmp_path):
    model, images = {"name": "vit_ti16", **TINY} | over, pictures(32)
    ours = randomized(**model)
    convert(save(ours, tmp_path / "ours.safetensors", model), tmp_path / "theirs", "transformers")
    found = ask(tmp_path, images, open=str(tmp_path / "theirs"))
    assert found.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(found, ours(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("over", ["", ", hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6", ", qkv_bias=False"])
def test_folders_of_transformers_4_convert_with_their_logits(over, tmp_path):
    images, sizes = pictures(32), "image_size=32, patch_size=8, hidden_size=48, intermediate_size=64, num_labels=7"
    arguments = f"{sizes}, num_hidden_layers=3, num_attention_heads=3{over}"
    made = {"make": "transformers.ViTForImageClassification", "arguments": arguments}
    expected = ask(tmp_path, images, **made, save=str(tmp_path / "theirs"))
    convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    with torch.no_grad():
        found = open_source(tmp_path / "ours.safetensors").build()(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))


def test_bicubic_is_timms(tmp_path):
    program = (
        "import sys; from read import torchvision_without_operators as w; w();"
        "from timm.layers import resample_abs_pos_embed as r; from safetensors.torch import load_file, save_file;"
        "save_file({'x': r(load_file(sys.argv[1])['x'], [9, 9], num_prefix_tokens=1)}, sys.argv[2])"
    )
    table = torch.randn(1, 17, 12, generator=torch.Generator().manual_seed(0))
    save_file({"x": table}, tmp_path / "in")
    command = [PYTHON, "-c", program, tmp_path / "in", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT / "tests/peers", capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    found = bicubic(table, Positions("learned", "stem", 9, 12, True, 0))
    torch.testing.assert_close(found, load_file(tmp_path / "out")["x"], rtol=0, atol=1e-6)
