"""Scores of predictions against counting one image at a time."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.evaluate.predict import predict
from pipeline.evaluate.scores import Scores
from pipeline.writable import make_writable
from shards.augment import Resize
from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from tests.shards.datasets import Made, plain, write_dataset
from tests.shards.sources.test_imagenet import TRUTH, write_devkit, write_val

CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
LABELS = [(0,), (1, 2), (), (3,), (0,), (5, 0, 6), (3,), (), (4,), (3,), (1,), (2,)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    made = [Made(f"k{i}", plain("red"), labels) for i, labels in enumerate(LABELS)]
    return Dataset.open(write_dataset(tmp_path_factory.mktemp("scores") / "set", CLASSES, [made[:5], made[5:]]))


@pytest.fixture(scope="module")
def logits():
    logits = 2 * np.random.default_rng(5).standard_normal((len(LABELS), len(CLASSES)))
    for image, labels in enumerate(LABELS):  # a model that is right now and then
        if labels and image % 3:
            logits[image, labels[-1]] += 3
    return logits


@pytest.fixture
def scores(dataset, logits, alone):
    found = predict(lambda images: torch.from_numpy(logits), dataset, Resize(8), len(LABELS))
    return Scores(found, dataset)


@pytest.fixture
def by_hand(logits):
    """(image, labels, shares, classes from best to worst) of the images that count."""
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return [
        (i, labels, shares[i], sorted(range(len(CLASSES)), key=lambda c: -shares[i, c]))
        for i, labels in enumerate(LABELS)
        if labels
    ]


def test_the_summary_tells_real_labels(tmp_path, alone):
    write_val(tmp_path / "val.tar")
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", TRUTH)
    (tmp_path / "real.json").write_text(json.dumps([[2], [], [0, 1], [0], [2, 0], []]))
    for name, options in (("real", {"real": str(tmp_path / "real.json")}), ("plain", {})):
        build(tmp_path / "val.tar", tmp_path / name, options=options, workers=1)
        dataset = Dataset.open(tmp_path / name)
        first = torch.zeros(len(dataset), len(dataset.classes))
        first[:, 0] = 1
        found = Scores(predict(lambda images, first=first: first, dataset, Resize(8), len(dataset)), dataset).summary()
        told = (4, 2, "ReaL", 3 / 4) if name == "real" else (6, None, None, 2 / 6)
        assert (found["images"], found.get("unlabelled"), found.get("labels"), found["top1"]) == told


def test_the_summary_counts_each_image_with_labels_once(scores, by_hand):
    found = scores.summary()
    assert (found["images"], found["unlabelled"]) == (10, 2)
    assert found["top1"] == np.mean([ranked[0] in labels for _, labels, _, ranked in by_hand])
    assert found["top5"] == np.mean([bool(set(ranked[:5]) & set(labels)) for _, labels, _, ranked in by_hand])
    assert 0 < found["top1"] < found["top5"] <= 1
    losses = [-np.mean([np.log(shares[label]) for label in labels]) for _, labels, shares, _ in by_hand]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_calibration_error_is_the_mean_gap_of_fifteen_bins(scores, by_hand):
    bins = {}
    for _, labels, shares, ranked in by_hand:
        place = next(b for b in range(15) if shares.max() <= (b + 1) / 15)
        bins.setdefault(place, []).append((shares.max(), ranked[0] in labels))
    gap = sum(
        len(each) / 10 * abs(np.mean([c for c, _ in each]) - np.mean([r for _, r in each])) for each in bins.values()
    )
    assert scores.summary()["calibration_error"] == pytest.approx(gap, abs=1e-6)
    assert len(bins) > 2
    rows = scores.calibration().to_pylist()
    assert [round(row["above"] * 15) for row in rows] == sorted(bins)
    for row in rows:
        inside = bins[round(row["above"] * 15)]
        assert row["images"] == len(inside)
        assert row["confidence"] == pytest.approx(np.mean([c for c, _ in inside]), abs=1e-6)
        assert row["top1"] == np.mean([r for _, r in inside])


def test_files_hold_every_prediction_and_the_tables(scores, by_hand, tmp_path):
    make_writable(tmp_path / "out")
    scores.write(tmp_path / "out")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "calibration.csv", "classes.csv", "confusion.csv", "predictions.parquet",
    ]  # fmt: skip
    rows = pq.read_table(tmp_path / "out/predictions.parquet").to_pylist()
    assert [row["key"] for row in rows] == [f"k{i}" for i in range(len(LABELS))]
    assert [tuple(row["labels"]) for row in rows] == LABELS
    assert [row["right"] for row in rows if not row["labels"]] == [None, None]
    for image, labels, shares, ranked in by_hand:
        assert rows[image]["predicted"] == ranked[:5]
        assert rows[image]["shares"] == pytest.approx([shares[c] for c in ranked[:5]], rel=1e-5)
        assert rows[image]["right"] == (ranked[0] in labels)

    with open(tmp_path / "out/classes.csv") as file:
        table = {row["class"]: row for row in csv.DictReader(file)}
    assert list(table) == CLASSES
    for label, name in enumerate(CLASSES):
        mine = [ranked[0] in labels for _, labels, _, ranked in by_hand if label in labels]
        assert (int(table[name]["images"]), int(table[name]["right"])) == (len(mine), sum(mine))
        assert table[name]["top1"] == "" if not mine else float(table[name]["top1"]) == np.mean(mine)

    with open(tmp_path / "out/confusion.csv") as file:
        cells = [(row["is"], row["taken_for"], int(row["images"])) for row in csv.DictReader(file)]
    expected = {}
    for _, labels, _, ranked in by_hand:
        if len(labels) == 1:
            pair = (CLASSES[labels[0]], CLASSES[ranked[0]])
            expected[pair] = expected.get(pair, 0) + 1
    assert {(one, other): count for one, other, count in cells} == expected
    assert [count for *_, count in cells] == sorted(expected.values(), reverse=True)


def test_a_set_without_labels_cannot_be_scored(tmp_path, alone):
    dataset = Dataset.open(write_dataset(tmp_path / "set", CLASSES, [[Made("k", plain("red"), ())]]))
    found = predict(lambda images: torch.zeros(1, 7), dataset, Resize(8), 1)
    with pytest.raises(UserError, match=r"no image of .* has a label; there is nothing to score"):
        Scores(found, dataset)
