"""Frozen features of real images: the same on any number of ranks, and what is fitted to them is what numpy fits."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.evaluate import frozen
from pipeline.evaluate.fewshot import fewshot_accuracy, least_squares_accuracy
from pipeline.evaluate.frozen import frozen_features_accuracy
from pipeline.evaluate.linear import linear_accuracy
from pipeline.models import create_model
from shards.augment import CenterCrop, Resize, ResizeCenterCrop
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import UserError
from shards.evaluation import EvaluationLoader
from tests.images import build_image_set
from tests.ranks import ends_of_ranks, run_on_ranks
from tests.shards.datasets import Made, plain, write_dataset

WORKER = Path(__file__).parent / "worker_frozen.py"
SLOW_WORKER = Path(__file__).parent / "worker_frozen_slow.py"
VIEW = ResizeCenterCrop(16)  # the default


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    build_image_set(folder, per_class=12, split={"val": 0.3}, shard_samples=10)
    return folder / "set"


def by_hand(folder, name, view=VIEW):
    """Features and pixels from one image at a time."""
    dataset = Dataset.open(folder / name)
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    features, pixels, labels = [], [], []
    for index in range(len(dataset)):
        sample = dataset[index]
        image = view(decode(sample.image, sample.key), (0, 0, 0)).astype(np.float32) / 127.5 - 1
        image = image.transpose(2, 0, 1)
        with torch.no_grad():
            features.append(model.features(torch.from_numpy(image.copy())[None])[0].numpy())
        pixels.append(image.ravel())
        labels.append(sample.labels[0])
    return {"features": np.stack(features), "pixels": np.stack(pixels)}, np.array(labels)


@pytest.mark.parametrize("ranks", [1, 3])
def test_accuracies_are_those_of_features_made_by_hand_on_any_number_of_ranks(folder, alone, ranks):
    found, *others = run_on_ranks(WORKER, ranks, folder)
    assert others == [{}] * (ranks - 1)
    (train, train_labels), (test, test_labels) = (by_hand(folder, name) for name in ("train", "val"))
    for kind in ("features", "pixels"):
        data = train[kind], train_labels, test[kind], test_labels
        for shots in (1, 4):
            expected = fewshot_accuracy(*data, shots)
            assert found[kind]["seeds"][str(shots)] == expected.tolist()
            assert found[kind]["shots"][str(shots)] == pytest.approx(expected.mean())
        assert (found[kind]["all"], found[kind]["l2"]) == least_squares_accuracy(*data)
    assert 0 <= found["features"]["knn"] <= 1
    probed = (torch.from_numpy(each) for each in (train["features"], train_labels, test["features"], test_labels))
    assert found["features"]["linear"] == pytest.approx(linear_accuracy(*probed, 3))
    assert "linear" not in found["pixels"]
    assert "knn" not in found["pixels"]


def test_of_another_view_they_are_too(folder, alone):
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    sets = [Dataset.open(folder / name) for name in ("train", "val")]
    pixels = []
    for name, view in (("resize", Resize(16)), ("center_crop", CenterCrop(16))):
        (train, train_labels), (test, test_labels) = (by_hand(folder, part, view) for part in ("train", "val"))
        found = frozen_features_accuracy(model, *sets, [4], view=name)
        for kind in ("features", "pixels"):
            expected = fewshot_accuracy(train[kind], train_labels, test[kind], test_labels, 4)
            assert found[kind]["seeds"]["4"] == expected.tolist()
        pixels.append(train["pixels"])
    assert not np.array_equal(*pixels)


def test_as_many_threads_decode_as_the_rank_has_cores(folder, alone, monkeypatch):
    threads = []

    class Watched(EvaluationLoader):
        def __iter__(self):
            threads.append(self.threads)
            return super().__iter__()

    monkeypatch.setattr(frozen, "EvaluationLoader", Watched)
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    frozen_features_accuracy(model, *(Dataset.open(folder / name) for name in ("train", "val")), [1])
    assert threads == [len(os.sched_getaffinity(0))] * 2


def test_of_a_large_set_there_are_no_raw_pixels(folder, alone, monkeypatch):
    monkeypatch.setattr(frozen, "PIXELS", 1000)
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    sets = (Dataset.open(folder / name) for name in ("train", "val"))
    found = frozen_features_accuracy(model, *sets, [1])
    assert list(found) == ["features"]
    assert "knn" not in found["features"]


def test_pixels_of_both_sets_count(folder, alone, monkeypatch):
    model = create_model("vit_ti8", embed_dim=24, num_heads=3, depth=1, image_size=16, num_classes=3, seed=3).eval()
    train, test = (Dataset.open(folder / name) for name in ("train", "val"))
    size = (len(train) + len(test)) * 3 * 16 * 16 * 4
    for most, kinds in ((size - 1, ["features"]), (size, ["features", "pixels"])):
        monkeypatch.setattr(frozen, "PIXELS", most)
        assert list(frozen_features_accuracy(model, train, test, [1])) == kinds


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_without_room_for_the_features_is_one_line(folder, tmp_path, ranks):
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], timeout=10, check=False)
    if done.returncode:
        pytest.skip("only root may mount a disk of its own")
    try:
        ends = ends_of_ranks(WORKER, ranks, folder, tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], timeout=10, check=True)
    for each in ends:
        said = r"UserError: features and pixels of \d+ images take .* GB, which do not go into .* set TMPDIR"
        assert re.search(said, each.stderr), each


def test_ranks_that_do_not_share_the_folder_are_told_in_one_line(folder, tmp_path):
    may = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", tmp_path], timeout=10, check=False)
    if may.returncode:
        pytest.skip("only root may have mounts of its own")
    for rank, each in enumerate(ends_of_ranks(WORKER, 2, folder, tmp_path, "apart")):
        said = r"UserError: rank 1 on \S+ cannot open \S+/features, which rank 0 has made \(No .*\); set TMPDIR to a"
        assert re.search(said, each.stderr), (rank, each)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_ranks_wait_for_a_closed_form_that_takes_longer_than_a_collective_may(folder):
    found, other = run_on_ranks(SLOW_WORKER, 2, folder)
    assert list(found) == ["features", "pixels"]
    assert other == {}


def test_what_cannot_be_fitted_is_refused_before_anything_is_extracted(folder, tmp_path, alone):
    sets = [Dataset.open(folder / name) for name in ("train", "val")]
    with pytest.raises(UserError, match=r"class .* has \d+ training images for 99 shots; ask for fewer"):
        frozen_features_accuracy(None, *sets, [1, 99])
    two = Dataset.open(write_dataset(tmp_path / "two", sets[0].classes, [[Made("k", plain("red"), (0, 1))]]))
    for pair in ((two, sets[1]), (sets[0], two)):
        with pytest.raises(UserError, match=r"image 0 of .*two has 2 labels; features want images with one each"):
            frozen_features_accuracy(None, *pair, [1])
    other = Dataset.open(write_dataset(tmp_path / "other", ["x"], [[Made("k", plain("red"), (0,))]]))
    with pytest.raises(UserError, match="has other classes than"):
        frozen_features_accuracy(None, other, sets[1], [1])
