"""transformers' own checkpoints, as it initialises and saves them, are fine-tuned here, and go back to it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from shards.augment import Resize
from shards.dataset import Dataset
from shards.decode import decode
from tests.command import patchmill
from tests.images import build_image_set

transformers = pytest.importorskip("transformers")

SETTINGS = """
kind = "finetune"
duration = "5 epochs"
global_batch = 16
init = "theirs"
[data]
train = "set/train"
val = "set/val"
resolution = 48
augment = "resize_crop"
[optim]
name = "sgd"
lr = 0.03
clip = 1.0
[engine]
kind = "accelerate"
"""


def save_theirs(kind: str, folder) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=11,
    )  # fmt: skip
    getattr(transformers, kind)(config).save_pretrained(folder)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_a_checkpoint_of_transformers_is_fine_tuned_at_a_higher_resolution(kind, tmp_path):
    build_image_set(tmp_path, per_class=30, split={"val": 0.3})
    save_theirs(kind, tmp_path / "theirs")
    (tmp_path / "c.toml").write_text(SETTINGS)
    done = patchmill("train", "c.toml", "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] < 1.2  # the head began at zero, of three classes: ln 3
    assert result["val"]["top1"] > 0.9
    if kind == "ViTModel":
        return

    done = patchmill("evaluate", "run", "set/val", "--out", "e", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["top1"] == pytest.approx(result["val"]["top1"])
    assert patchmill("convert", "run", "back", "--to", "transformers", cwd=tmp_path).returncode == 0
    back = transformers.ViTForImageClassification.from_pretrained(tmp_path / "back").eval()
    assert (back.config.image_size, list(back.config.id2label.values())) == (48, ["blue", "green", "red"])
    dataset = Dataset.open(tmp_path / "set/val")
    rows = {row["key"]: row for row in pq.read_table(tmp_path / "e/predictions.parquet").to_pylist()}
    assert len(rows) == len(dataset)
    for place in range(len(dataset)):
        sample = dataset[place]
        pixels = Resize(48)(decode(sample.image, sample.key), (0, 0, 0)).astype(np.float32) / 127.5 - 1
        with torch.no_grad():
            shares = back(torch.from_numpy(pixels).permute(2, 0, 1)[None]).logits.softmax(1)[0]
        order = shares.argsort(descending=True).tolist()
        assert rows[sample.key]["predicted"] == order
        assert rows[sample.key]["shares"] == pytest.approx(shares[order].tolist(), abs=1e-5)
