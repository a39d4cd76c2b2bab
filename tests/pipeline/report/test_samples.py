"""Pictures of the page are of the model that was evaluated, and of what it saw."""

import base64
import html
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import TrainSettings
from pipeline.convert.recognise import load_model
from pipeline.figures.write import draw_figures
from pipeline.images import to_model_input
from pipeline.report.accuracies import accuracies
from pipeline.report.learned import learned
from pipeline.report.run import read_run
from pipeline.report.samples import samples
from pipeline.settings import check
from pipeline.train import train
from shards.augment import CenterCrop
from shards.dataset import Dataset
from shards.decode import decode
from tests.shards.datasets import Made, write_dataset

CLASSES = ["blue & green", "red"]
LABELS = [(0,), (1,), (), (0, 1), (0,), ()]


def striped(label: int, number: int) -> bytes:
    """Return an image whose sides, which a crop of the middle leaves out, are as those of the other class."""
    pixels = np.random.default_rng(number).integers(0, 256, (16, 48, 3)).astype(np.uint8)
    pixels[:, :16, label * 2] = 255
    pixels[:, 16:, 2 - label * 2] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def run(tmp_path, alone):
    train_set = [Made(f"t{n}", striped(n % 2, n), (n % 2,)) for n in range(12)]
    held_out = [Made(f"v{n}", striped(n % 2, 100 + n), labels) for n, labels in enumerate(LABELS)]
    data = {
        "train": str(write_dataset(tmp_path / "train", CLASSES, [train_set])),
        "val": str(write_dataset(tmp_path / "val", CLASSES, [held_out])), "resolution": 16,
    }  # fmt: skip
    table = {
        "duration": "12 steps", "global_batch": 4, "engine": {"kind": "accelerate"}, "data": data,
        "optim": {"lr": 1e-2, "ema": 0.95}, "evaluate": {"ema": True, "view": "center_crop"},
        "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1},
    }  # fmt: skip
    train(check(TrainSettings, table, "test"), tmp_path / "run")
    return read_run(tmp_path / "run")


def test_images_are_told_by_the_moving_average_of_what_the_evaluation_saw(run):
    (stage,) = run.stages.values()
    model, _ = load_model(stage.folder, ema=True)
    expected = []
    dataset = Dataset.open(stage.settings["data"]["val"])
    for index, labels in enumerate(LABELS):
        sample = dataset[index]
        seen = CenterCrop(16)(decode(sample.image, sample.key), (0, 0, 0))
        with torch.no_grad():
            shares = model(to_model_input(seen[None], torch.device("cpu")))[0].softmax(dim=0)
        guess = int(shares.argmax())
        caption = f"{CLASSES[guess]} {100 * float(shares[guess]):.0f} %"
        if not labels:
            expected.append(("", f"{caption}<br>has no label"))
        elif guess in labels:
            expected.append(("right", caption))
        else:
            expected.append(("wrong", f"{caption}<br>is {', '.join(CLASSES[label] for label in labels)}"))
    found = re.findall(r"<figcaption(?: class=(\w+))?>(.*?)</figcaption>", samples(stage))
    assert [(how, html.unescape(text)) for how, text in found] == expected


def test_figures_are_of_the_moving_average(run):
    ((stage, text),) = learned(run)
    averaged, raw = (next(draw_figures(stage.folder, None, ema)).data for ema in (True, False))
    assert averaged != raw
    assert base64.b64encode(averaged).decode() in text
    assert base64.b64encode(raw).decode() not in text


def test_the_most_frequent_class_is_a_share_of_the_images_with_labels(run):
    rows = {row.what: (row.top1, row.how) for row in accuracies(run)}
    assert rows["most frequent class"] == (3 / 4, "always saying blue & green")
