"""What we build opens in other projects' own readers, each in the peers' environment; `make test-peers` runs it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from shards.build import build
from shards.dataset import Dataset

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers/bin"
IMAGES = ROOT / "examples/clipart/images"


def in_peers(program: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    assert (PEERS / program).exists(), f"there is no {program} in .venv-peers; make it with `make peers`"
    return subprocess.run([PEERS / program, *arguments], capture_output=True, text=True, timeout=250, check=False)


def read(peer: str, folder: Path) -> list[list]:
    done = in_peers("python", ROOT / "tests/peers/read.py", peer, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers") / "set"
    build(IMAGES, folder, shard_samples=300, captions=True, workers=1)
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def ours(dataset) -> list[list]:
    """Return [key, label, width, height] of every sample, from the manifest."""
    every = [dataset.rows(shard) for shard in range(len(dataset.shard_sizes))]
    found = [
        [key, *labels, int(width), int(height)]
        for rows in every
        for key, labels, width, height in zip(rows.key, rows.labels, rows.width, rows.height, strict=True)
    ]
    assert len(found) == len(dataset) == sum(path.is_file() for path in IMAGES.rglob("*"))
    assert len(every) > 1
    return found


def test_webdataset(dataset, ours):
    assert read("webdataset", Path(dataset.url) / "shards") == ours


def test_energon(dataset, ours, tmp_path):
    shutil.copytree(Path(dataset.url) / "shards", tmp_path / "shards")  # energon adds files of its own beside the tars
    fields = json.dumps({"image": "jpg,png,webp", "label": "cls"})
    prepared = in_peers(
        "energon", "prepare", tmp_path / "shards", "--non-interactive", "--no-progress", "--num-workers", "1",
        "--split-ratio", "1,0,0", "--sample-type", "ImageClassificationSample", "--field-map", fields,
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    assert read("energon", tmp_path / "shards") == ours


def test_timm(dataset, ours):
    assert read("timm", Path(dataset.url) / "shards") == [[None, *rest] for _, *rest in ours]


def test_open_clip(dataset, ours):
    captions = [[None, dataset.classes[label], *size] for _, label, *size in ours]
    assert read("open_clip", Path(dataset.url) / "shards") == captions
