from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluate.classify import classify
from pipeline.models import create_model
from pipeline.models.initial import initial_value
from shards.augment import TRANSFORMS, CenterCrop, Resize
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import UserError
from tests.images import build_image_set
from tests.ranks import run_on_ranks
from tests.shards.datasets import Made, plain, write_dataset

WORKER = Path(__file__).parent / "worker_classify.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_image_set(tmp_path_factory.mktemp("classify"), per_class=9, shard_samples=10)


@pytest.fixture(scope="module")
def by_hand(folder) -> dict:
    """The same figures from one image at a time."""
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    model.head.weight.data = initial_value(model, "blocks.0.mlp.fc1.weight", (3, 24), 5)
    dataset = Dataset.open(folder)
    best, right, losses = [], [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        pixels = Resize(16)(decode(sample.image, sample.key), (0, 0, 0)).astype(np.float32) / 127.5 - 1
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])[0].double().numpy()
        best.append(int(logits.argmax()))
        right.append(logits.argmax() == sample.labels[0])
        losses.append(np.log(np.exp(logits).sum()) - logits[sample.labels[0]])
    return {"top1": np.mean(right), "loss": np.mean(losses), "images": 27, "top5": 1.0, "best": best}


@pytest.mark.parametrize(("ranks", "batch"), [(1, 64), (2, 4), (3, 5), (4, 3)])
def test_every_image_counts_once_on_any_number_of_ranks(folder, by_hand, ranks, batch):
    results = run_on_ranks(WORKER, ranks, folder, batch)
    assert all(result == results[0] for result in results)
    for found in results[0]:
        assert found["images"] == 27
        assert found["top1"] == pytest.approx(by_hand["top1"])
        assert found["loss"] == pytest.approx(by_hand["loss"], rel=1e-5)
    assert results[0][1]["best"] == by_hand["best"]


def test_a_model_sees_the_view_that_is_named(folder, alone):
    dataset = Dataset.open(folder)
    images = [decode(dataset[index].image, dataset[index].key) for index in range(len(dataset))]
    for view, transform in [("resize", Resize(16)), ("center_crop", CenterCrop(16))]:
        seen = []

        def model(pixels, seen=seen):
            seen.append(pixels)
            return torch.zeros(len(pixels), 3)

        assert classify(model, dataset, TRANSFORMS[view](16), 27)["images"] == 27
        pixels = np.stack([transform(image, (0, 0, 0)) for image in images]).astype(np.float32) / 127.5 - 1
        assert np.abs(torch.cat(seen).numpy() - pixels.transpose(0, 3, 1, 2)).max() < 1e-6


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_of_several_labels_each_is_right(tmp_path, alone, loss):
    labels = [(0,), (1, 2), (2, 0), (1,)]
    made = [Made(f"k{i}", plain("red"), each) for i, each in enumerate(labels)]
    dataset = Dataset.open(write_dataset(tmp_path / "set", ["a", "b", "c"], [made]))
    logits = np.array([[3.0, 1, 2], [0, 1, 4], [0, 4, 1], [0.5, 1.5, 1]])
    found = classify(lambda images: torch.from_numpy(logits), dataset, Resize(8), 4, loss=loss)
    assert (found["top1"], found["top5"], found["images"]) == (0.75, 1.0, 4)
    losses = []
    for row, each in zip(logits, labels, strict=True):
        target = np.isin(np.arange(3), each).astype(float)
        if loss == "softmax":
            losses.append(-(target / target.sum() * (row - np.log(np.exp(row).sum()))).sum())
        else:
            losses.append((target * np.log1p(np.exp(-row)) + (1 - target) * np.log1p(np.exp(row))).sum())
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize("batch", [2, 3, 8])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_images_without_a_label_are_not_counted(tmp_path, alone, loss, batch):
    """So a stage may be judged by ReaL labels."""
    labels = [(0,), (), (1, 2), (2, 0), (), (1,), (2,)]
    logits = np.random.default_rng(0).standard_normal((7, 3))
    parts = {"all": range(7), "labelled": [place for place, each in enumerate(labels) if each]}
    found = {}
    for name, places in parts.items():
        made = [Made(f"k{place}", plain((place, 0, 0)), labels[place]) for place in places]
        dataset = Dataset.open(write_dataset(tmp_path / name, ["a", "b", "c"], [made]))

        def model(pixels):
            return torch.from_numpy(logits)[((pixels[:, 0, 0, 0] + 1) * 127.5).round().long()]

        found[name] = classify(model, dataset, Resize(8), batch, loss=loss)
    assert found["all"] == pytest.approx(found["labelled"])
    assert found["all"]["images"] == 5
    none = write_dataset(tmp_path / "none", ["a"], [[Made("k", plain("red"), ())]])
    with pytest.raises(UserError, match=r"no image of .*none has a label; there is nothing to score"):
        classify(lambda pixels: torch.zeros(len(pixels), 1), Dataset.open(none), Resize(8), batch, loss=loss)
