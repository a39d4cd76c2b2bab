"""Probes while a model trains: on any number of ranks what one process finds, and by independent means."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.evaluate.fewshot import fewshot_accuracy
from pipeline.evaluate.linear import linear_accuracy
from pipeline.evaluate.probe import Probe
from pipeline.models import create_model
from pipeline.settings import check
from shards.augment import Resize, ResizeCenterCrop, Transform
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import UserError
from tests.images import build_image_set
from tests.ranks import run_on_ranks
from tests.shards.datasets import Made, plain, write_dataset

WORKER = Path(__file__).parent / "worker_probe.py"
VIEW = ResizeCenterCrop(16)  # the default


def clusters(n: int, seed: int, d: int = 12, classes: int = 4, noise: float = 4.0):
    centres = np.random.default_rng(9).normal(size=(classes, d)) * 2 + 3
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    return centres[labels] + noise * rng.normal(size=(n, d)), labels


def newton(x: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """The logistic regression of x [n, D], standardised here, by Newton's method: [D + 1, K], the last row the bias."""
    x = np.pad((x - x.mean(0)) / (x.std(0) + 1e-5), ((0, 0), (0, 1)), constant_values=1.0)
    width = x.shape[1]
    weights, penalty = np.zeros((width, classes)), np.diag([*[1.0] * (width - 1), 0.0])
    targets = np.eye(classes)[labels]
    for _ in range(50):
        logits = x @ weights
        shares = np.exp(logits - logits.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        gradient = x.T @ (shares - targets) + penalty @ weights
        hessian = np.zeros((classes, width, classes, width))
        for a in range(classes):
            for b in range(classes):
                curve = shares[:, a] * ((a == b) - shares[:, b])
                hessian[a, :, b] = (x * curve[:, None]).T @ x + (a == b) * penalty
        step = np.linalg.lstsq(hessian.reshape(classes * width, -1), gradient.T.reshape(-1), rcond=None)[0]
        weights -= step.reshape(classes, width).T
    return weights


def test_linear_probing_is_logistic_regression(alone, monkeypatch):
    (x, labels), (test, test_labels) = clusters(150, 0), clusters(400, 1)
    weights = newton(x, labels, 4)
    standardised = (test - x.mean(0)) / (x.std(0) + 1e-5)
    expected = ((standardised @ weights[:-1] + weights[-1]).argmax(1) == test_labels).mean()
    assert 0.4 < expected < 0.95
    arguments = [torch.from_numpy(each) for each in (x, labels, test, test_labels)]
    assert linear_accuracy(*arguments, 4) == pytest.approx(expected, abs=1.1 / 400)
    monkeypatch.setattr("pipeline.evaluate.linear.CHUNK", 32)
    assert linear_accuracy(*arguments, 4) == pytest.approx(expected, abs=1.1 / 400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    build_image_set(folder, per_class=12, split={"test": 0.4}, shard_samples=7)
    return folder / "set"


def settings(train: Path, test: Path, ranks: int = 1, engine: dict | None = None, **over) -> TrainSettings:
    return check(TrainSettings, {
        "duration": "1 step", "global_batch": ranks, "data": {"train": "-", "resolution": 16}, "engine": engine or {},
        "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1}, "evaluate": {"batch": 3},
        "probe": {"train": str(train), "test": str(test), "shots": [1, 3], "linear": True, **over},
    }, "test")  # fmt: skip


def features_by_hand(dataset: Dataset, view: Transform = VIEW) -> tuple[np.ndarray, np.ndarray]:
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    samples = [dataset[index] for index in range(len(dataset))]
    pixels = np.stack([view(decode(each.image, each.key), (0, 0, 0)) for each in samples])
    with torch.no_grad():
        features = model.features(torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2))
    return features.numpy(), np.array([each.labels[0] for each in samples])


@pytest.mark.long
def test_probes_find_the_same_on_any_ranks_and_engines_as_one_image_after_the_other(folder):
    train, test = (features_by_hand(Dataset.open(folder / part)) for part in ("train", "test"))
    few = {f"probe_{n}shot": fewshot_accuracy(*train, *test, n).mean() for n in (1, 3)}
    weights = newton(train[0].astype(np.float64), train[1], 3)
    standardised = (test[0] - train[0].mean(0)) / (train[0].std(0) + 1e-5)
    few["probe_linear"] = ((standardised @ weights[:-1] + weights[-1]).argmax(1) == test[1]).mean()
    for ranks, engines in ((1, ["accelerate-0"]), (2, ["deepspeed-3", "accelerate-0"]), (3, ["deepspeed-1"])):
        for found in run_on_ranks(WORKER, ranks, folder, *engines):
            for engine in engines:
                assert found[engine] == pytest.approx(few, abs=1e-9), (ranks, engine)


def test_the_view_is_the_probes_own(folder, alone):
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3)
    sets = folder / "train", folder / "test"
    for name, view in (("resize", Resize(16)), ("resize_center_crop", ResizeCenterCrop(16))):
        train, test = (features_by_hand(Dataset.open(each), view) for each in sets)
        probe = Probe(settings(*sets, shots=[3], linear=False, view=name))
        expected = fewshot_accuracy(*train, *test, 3).mean()
        assert probe.measure(model, 0, None) == {"probe_3shot": pytest.approx(expected, abs=1e-9)}
    assert not np.array_equal(train[0], features_by_hand(Dataset.open(sets[0]), Resize(16))[0])


def test_what_cannot_be_probed_is_told_at_the_start(folder, tmp_path, alone):
    with pytest.raises(UserError, match=r"class \w+ has \d+ training images for 50 shots; ask for fewer"):
        Probe(settings(folder / "train", folder / "test", shots=[50]))
    with pytest.raises(UserError, match="neither fewshot nor linear is to be probed"):
        settings(folder / "train", folder / "test", fewshot=False, linear=False)
    made = [Made(f"k{i}", plain("red"), labels) for i, labels in enumerate([(0,), (1, 2), (2,)])]
    several = write_dataset(tmp_path / "several", Dataset.open(folder / "train").classes, [made])
    with pytest.raises(UserError, match=r"image 1 of .*several has 2 labels; features want images with one each"):
        Probe(settings(folder / "train", several))
    other = write_dataset(tmp_path / "other", ["a", "b"], [made[:1]])
    with pytest.raises(UserError, match=r"other has other classes than .*train; build both with one list"):
        Probe(settings(folder / "train", other))
