"""Read tars with another project's own reader, and print what it found: ``python read.py PEER FOLDER``.

Runs in the peers' environment, which has no Patchmill. The last line of stdout is a JSON list of [key, label, width,
height] in the order they came; null for what this reader does not give.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

Seen = Iterator[tuple[str | None, int | str | None, int, int]]


def webdataset(folder: Path) -> Seen:
    """Stock webdataset; the label is the class index."""
    import webdataset

    samples = webdataset.WebDataset(shards(folder), shardshuffle=False).decode("pil")
    for key, image, label in samples.to_tuple("__key__", "jpg;png;webp", "cls"):
        yield key, label, *image.size


def energon(folder: Path) -> Seen:
    """Megatron-Energon, over what ``energon prepare`` has made of the folder; the label is the class index."""
    from megatron.energon import DefaultTaskEncoder, SampleDecoder, WorkerConfig, get_loader, get_val_dataset

    class TaskEncoder(DefaultTaskEncoder):
        """Gives each sample as it is; energon's own default makes batches of tensors."""

        decoder = SampleDecoder(image_decode="pil")

    workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_val_dataset(
        folder, split_part="train", worker_config=workers, batch_size=None, task_encoder=TaskEncoder()
    )
    for sample in get_loader(dataset):
        yield sample.__key__, sample.label, *sample.image.size


def timm(folder: Path) -> Seen:
    """timm's own data set over tars; the label is the class index."""
    torchvision_without_operators()
    from timm.data import create_dataset

    names = "::".join(Path(path).name for path in shards(folder))
    for image, label in create_dataset("wds/", root=str(folder), split=names):
        yield None, label, *image.size


def torchvision_without_operators() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    The registry has it as a CUDA build only. Its compiled operators cannot load then, and its import fails where it
    describes two of them that no reader uses; named, they need not be there.
    """
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_without_operators.library = library  # the names live as long as it does


def open_clip(folder: Path) -> Seen:
    """OpenCLIP's validation data; the label is the caption, which is the class name."""
    torchvision_without_operators()
    import torch
    from open_clip_train.data import get_data

    settings = SimpleNamespace(
        train_data=None,
        val_data="::".join(shards(folder)),
        val_num_samples=None,
        dataset_type="webdataset",
        imagenet_val=None,
        imagenet_v2=None,
        batch_size=1,
        workers=0,
    )

    def size(image):
        return torch.tensor(image.size)

    loader = get_data(settings, (None, size), tokenizer=lambda caption: [caption])["val"].dataloader
    for (shape,), (caption,) in loader:
        yield None, caption, *shape.tolist()


def shards(folder: Path) -> list[str]:
    """Return the paths of the tars in order."""
    return sorted(str(path) for path in folder.glob("*.tar"))


if __name__ == "__main__":
    peer, place = sys.argv[1:]
    print(json.dumps(list({each.__name__: each for each in (webdataset, energon, timm, open_clip)}[peer](Path(place)))))
