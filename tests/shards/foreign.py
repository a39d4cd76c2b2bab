"""Tars as other projects write them."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.dataset import Dataset, Sample
from tests.shards.images import encode

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}


def image(seed: int, extension: str = "jpg") -> bytes:
    """Return an image of 20 + seed % 7 by 16 pixels."""
    return encode(seed, FORMATS[extension], (20 + seed % 7, 16))


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    """Write (name, content) pairs into a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


Picture = Callable[[int], bytes]


def write_webdataset(
    folder: Path, samples: int = 24, shard: int = 10, classes: int = 3, picture: Picture = image
) -> Path:
    """Write a set with the stock ``webdataset.ShardWriter``."""
    from webdataset import ShardWriter

    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(str(folder / "set-%06d.tar"), maxcount=shard, verbose=0) as writer:
        for i in range(samples):
            writer.write({"__key__": f"sample{i:05d}", "jpg": picture(i), "cls": i % classes, "json": {"n": i}})
    return folder


def write_img2dataset(
    folder: Path, samples: int = 12, shard: int = 5, picture: Picture = image, classes: int | None = None
) -> Path:
    """Write a set in the layout of img2dataset: captions and metadata beside each image, tables beside each tar.

    With ``classes``, the metadata have a label, as with ``--save_additional_columns '["label"]'``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, samples, shard)):
        members, rows = [], []
        for place, i in enumerate(range(start, min(start + shard, samples))):
            key = f"{number:05d}{place:04d}"
            row = {
                "caption": f"a photo number {i}", "url": f"http://x/{i}.jpg", "key": key, "status": "success",
                "error_message": None, "width": 20, "height": 16, "original_width": 40, "original_height": 32,
                "exif": "{}", "sha256": "0" * 64,
            }  # fmt: skip
            if classes is not None:
                row["label"] = i % classes
            rows.append(row)
            members += [
                (f"{key}.jpg", picture(i)),
                (f"{key}.json", json.dumps(row, indent=4).encode()),
                (f"{key}.txt", row["caption"].encode()),
            ]
        write_tar(folder / f"{number:05d}.tar", members, tarfile.PAX_FORMAT)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": len(rows), "successes": len(rows)}))
    return folder


def samples(url: str | Path, **kwargs: object) -> list[Sample]:
    """Return all samples of a data set."""
    dataset = Dataset.open(url, **kwargs)
    return [dataset[i] for i in range(len(dataset))]


def write_named(folder: Path, *shards: list[str]) -> Path:
    """Write a tar for each list of class names."""
    for number, names in enumerate(shards):
        members = [
            (f"{number}-{i}.{e}", d) for i, n in enumerate(names) for e, d in [("jpg", image(i)), ("cls", n.encode())]
        ]
        write_tar(folder / f"{number}.tar", members)
    return folder


def replace_with_same_size(path: Path) -> None:
    """Make a tar anew with its samples in another order."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    size = path.stat().st_size
    path.unlink()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, data in members[3:] + members[:3]:
            tar.addfile(member, io.BytesIO(data))
    assert path.stat().st_size == size
