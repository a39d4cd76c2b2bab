"""Hybrids and BiT's ResNets against timm's, in the peers' environment; `make test-peers` runs it."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.models import create_model

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers/bin/python"

TIMMS = {
    "bit_r50x1": "resnetv2_50x1_bit",
    "bit_r50x3": "resnetv2_50x3_bit",
    "bit_r101x1": "resnetv2_101x1_bit",
    "bit_r101x3": "resnetv2_101x3_bit",
    "bit_r152x2": "resnetv2_152x2_bit",
    "bit_r152x4": "resnetv2_152x4_bit",
    "r50_vit_b16": "vit_base_r50_s16_224",
    "r50_vit_l32": "vit_large_r50_s32_224",
    "r26_vit_b32": "vit_base_r26_s32_224",
    "r26_vit_s32": "vit_small_r26_s32_224",
    "r_vit_ti16": "vit_tiny_r_s16_p8_224",
}


def ask_timm(request: dict, folder: Path) -> str:
    assert PYTHON.exists(), "there is no .venv-peers; make it with `make peers`"
    (folder / "request.json").write_text(json.dumps(request))
    command = [PYTHON, ROOT / "tests/peers/timm_models.py", folder / "request.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_and_shapes(tmp_path):
    theirs = json.loads(ask_timm({"names": list(TIMMS.values())}, tmp_path).splitlines()[-1])
    for ours, name in TIMMS.items():
        with torch.device("meta"):
            model = create_model(ours, seed=None)
        assert {key: list(p.shape) for key, p in model.named_parameters()} == theirs[name], ours


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("bit_r50x1", {}),
        ("bit_r101x1", {}),
        ("r50_vit_b16", {"depth": 3}),
        ("r50_vit_l32", {"depth": 2}),
        ("r26_vit_b32", {"depth": 2}),
        ("r26_vit_s32", {}),
        ("r_vit_ti16", {}),
    ],
)
def test_logits(name, settings, tmp_path):
    # In float32 a hundred layers of any two implementations lie 2e-5 apart; in float64 the same arithmetic is the same.
    hybrid = "vit" in name
    model = create_model(name, num_classes=10, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # what begins at 0 or 1 should have an effect
            if parameter.dim() == 1 or key.startswith("head."):
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
            elif hybrid and "backbone" in key:  # a filter's epsilon: ours is beside the root, theirs under it
                parameter.mul_(1e6)  # of filters so large neither has an effect, and no other size has one
    images = torch.randn(2, 3, 224, 224, generator=generator)
    model, images = model.double(), images.double()
    save_file(model.state_dict() | {"images": images}, tmp_path / "tensors.safetensors")
    request = {
        "name": TIMMS[name],
        "settings": {"num_classes": 10, **settings} | ({"act_layer": "gelu_tanh"} if hybrid else {}),
        "tensors": str(tmp_path / "tensors.safetensors"),
        "logits": str(tmp_path / "logits.safetensors"),
        "norm_eps": 1e-6 if hybrid else 1e-5,
        "filter_eps": 1e-12 if hybrid else 1e-10,
    }
    ask_timm(request, tmp_path)
    expected = load_file(tmp_path / "logits.safetensors")["logits"]
    with torch.no_grad():
        logits = model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10 * expected.abs().max().item())
