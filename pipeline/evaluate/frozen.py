"""What frozen features are worth: closed-form accuracy on few and on all training images, nearest neighbours.

Features are kept in files, and read some at a time: those of a million images need no more memory than of a thousand.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.evaluate.fewshot import check_shots, fewshot_accuracy, least_squares_accuracy
from pipeline.evaluate.knn import knn_accuracy
from pipeline.evaluate.linear import linear_accuracy
from pipeline.evaluate.rowfiles import RowFiles
from pipeline.images import to_model_input
from pipeline.models import Model
from pipeline.prefetch import prefetched
from pipeline.settings import View
from shards.augment import TRANSFORMS, Transform
from shards.dataset import Dataset
from shards.errors import UserError
from shards.evaluation import EvaluationBatch, EvaluationLoader

BATCH = 64
PIXELS = 2**28  # bytes of raw pixels, as float32, up to which they are a baseline
SEEDS = (0, 1, 2)  # of the few shots


class Frozen(NamedTuple):
    """Of the n images of a data set: features float32 [n, D], raw pixels float32 [n, 3*H*W] or None, labels [n]."""

    features: np.ndarray
    pixels: np.ndarray | None
    labels: np.ndarray


def frozen_features_accuracy(
    model: Model,
    train: Dataset,
    test: Dataset,
    shots: Sequence[int],
    neighbours: int | None = None,
    linear: bool = False,
    view: View = "resize_center_crop",
) -> dict[str, dict]:
    """Fit linear classifiers on training images, score them on test images (vit-paper 4); collective over all ranks.

    Args:
        model: In evaluation mode; ``model(images, features=True)`` are those before the head, [n, D].
        train: Images with one label each.
        test: The same, of the same classes.
        shots: Numbers of images a class.
        neighbours: Of the k nearest training images, k; None: they are not asked.
        linear: Probe linearly, too: the features of a rank's share of the images are in its memory then.
        view: What the model sees of an image; by default what ``fewshot_lsr.py`` of big_vision shows it.

    Returns:
        On rank 0, for ``features``, and for ``pixels`` (the same images, flattened) if the sets are small:
        ``shots`` (mean top-1 over three seeds, by number of shots), ``seeds`` (each of them), ``all`` (top-1 of least
        squares on every training image) and its ``l2``; of features ``knn`` and ``linear`` too. On other ranks nothing.
    """
    if train.classes != test.classes:
        raise UserError(f"{test.url} has other classes than {train.url}; build both with one command")
    labels = single_labels(train), single_labels(test)
    check_shots(labels[0], len(train.classes), max(shots), train.classes)
    distributed.let_collectives_take_long()  # others wait for the closed form of rank 0; who dies is told all the same
    model = model.to(distributed.device())
    with_pixels = (len(train) + len(test)) * 3 * model.image_size**2 * 4 <= PIXELS
    with ExitStack() as stack:
        # Of all ranks' images, on a disk that they share.
        own = tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if distributed.rank() == 0 else nullcontext()
        folder = Path(distributed.everyone(stack.enter_context(own))[0])
        transform = TRANSFORMS[view](model.image_size)
        of_train, of_test = (
            Frozen(*extract(model, each, folder / name, transform, with_pixels), truth)
            for each, name, truth in zip((train, test), ("train", "test"), labels, strict=True)
        )
        result = _scores(of_train, of_test, shots, neighbours) if distributed.rank() == 0 else {}
        probed = _probed(of_train, of_test, len(train.classes)) if linear else None
        if result and linear:
            result["features"]["linear"] = probed
        del of_train, of_test  # over NFS a folder stays as long as a file in it is mapped
        distributed.everyone(None)  # before the files go
    return result


def _scores(train: Frozen, test: Frozen, shots: Sequence[int], neighbours: int | None) -> dict[str, dict]:
    result = {}
    for name in ("features", *(["pixels"] if train.pixels is not None else [])):
        x, y = getattr(train, name), getattr(test, name)
        few = {str(n): fewshot_accuracy(x, train.labels, y, test.labels, n, SEEDS).tolist() for n in shots}
        accuracy, l2 = least_squares_accuracy(x, train.labels, y, test.labels)
        means = {n: float(np.mean(each)) for n, each in few.items()}
        result[name] = {"shots": means, "seeds": few, "all": accuracy, "l2": l2}
    if neighbours:
        result["features"]["knn"] = knn_accuracy(
            train.features, train.labels, test.features, test.labels, neighbours, distributed.device()
        )
    return result


def _probed(train: Frozen, test: Frozen, classes: int) -> float:
    """Return the accuracy of logistic regression, of which each rank has every so-many-th image; collective."""
    mine = slice(distributed.rank(), None, distributed.world_size())
    x, labels, test_x, test_labels = (
        torch.from_numpy(np.array(each[mine])) for part in (train, test) for each in (part.features, part.labels)
    )
    return linear_accuracy(x, labels, test_x, test_labels, classes)


@torch.no_grad()
def extract(
    model: Model, dataset: Dataset, folder: Path, transform: Transform, with_pixels: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return features and pixels, as of ``Frozen``, of every image, in files of a folder; collective over all ranks.

    Args:
        model: As in ``frozen_features_accuracy``, on its device.
        dataset: Images with one label each.
        folder: That all ranks see; made here.
        transform: Makes of an image the square that the model sees.
        with_pixels: Keep what the model sees, too.

    Raises:
        UserError: The disk has no room for it, or the ranks do not share the folder.
    """
    device, side = distributed.device(), model.image_size
    width = model(torch.zeros(1, 3, side, side, device=device), features=True).shape[1]
    sizes = {"features": width, **({"pixels": 3 * side * side} if with_pixels else {})}
    files = RowFiles(folder, len(dataset), sizes)
    parts = EvaluationLoader(
        dataset, BATCH, transform=transform, rank=distributed.rank(), world_size=distributed.world_size(),
        threads=distributed.cores_each(),
    )  # fmt: skip

    def prepare(part: EvaluationBatch) -> tuple[Tensor, Tensor]:
        return to_model_input(part.images, device), torch.from_numpy(part.positions[part.valid])

    for images, places in prefetched(iter(parts), prepare, device):
        images, where = images[: len(places)], places.cpu().numpy()  # only the last rows of a batch are not valid
        if not len(where):
            continue  # of a small set, a rank may have none
        first = int(where[0])  # a batch is of images that lie together
        files.write("features", first, model(images, features=True).float().cpu().numpy())
        if with_pixels:
            files.write("pixels", first, images.flatten(1).cpu().numpy())
    tables = files.tables()
    return tables["features"], tables.get("pixels")


def single_labels(dataset: Dataset) -> np.ndarray:
    """Return the label of every image, int64 [n]; a UserError where one has none or several."""
    single = np.empty(len(dataset), dtype=np.int64)
    every = chain.from_iterable(dataset.rows(shard).labels for shard in range(len(dataset.shard_sizes)))
    for place, labels in enumerate(every):
        if len(labels) != 1:
            raise UserError(
                f"image {place} of {dataset.url} has {len(labels)} labels; features want images with one each"
            )
        single[place] = labels[0]
    return single
