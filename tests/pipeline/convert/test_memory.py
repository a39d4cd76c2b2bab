"""ViT-H/14 converts, its proof included, in at most one and a half times its own size of memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.convert import safetensors
from pipeline.convert.tensors import NOTE
from pipeline.models import create_model
from tests.command import environment

WORKER = Path(__file__).with_name("worker_memory.py")
MODEL = {"name": "vit_h14", "image_size": 224, "num_classes": 1000}


@pytest.fixture(scope="module")
def huge(tmp_path_factory) -> Path:
    with torch.device("meta"):
        made = create_model(**MODEL, seed=None)
    generator = torch.Generator().manual_seed(0)
    like = dict(made.named_parameters())
    path = tmp_path_factory.mktemp("huge") / "vit_h14.safetensors"
    note = {NOTE: json.dumps({"model": MODEL, "classes": []})}
    safetensors.write(path, like, lambda name: torch.randn(like[name].shape, generator=generator) * 0.02, note)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("to", ["safetensors", "transformers", "npz"])
def test_vit_h14_converts_in_one_and_a_half_times_its_size(to, huge):
    there = huge.parent / to
    command = [sys.executable, WORKER, huge, there, to]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    size = 4 * told["parameters"]
    assert told["parameters"] == 632_045_800
    print(f"{to}: {told['peak'] / 1e9:.2f} GB at the peak, {told['seconds']:.0f} s; {told['proof']}")
    assert told["peak"] <= 1.5 * size, f"{told['peak'] / 1e9:.2f} GB for {size / 1e9:.2f} GB"
    for path in [there, *there.glob("*")] if there.is_dir() else [there]:
        path.is_file() and path.unlink()
