"""Tars that webdataset and img2dataset wrote are indexed and trained on, as a user does it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import TRAIN, patchmill
from tests.shards.foreign import write_img2dataset, write_webdataset


def coloured(number: int) -> bytes:
    """Return noise around one of three colours, a JPEG."""
    pixels = np.random.default_rng(number).integers(0, 120, (20, 20 + number % 5, 3), dtype=np.uint8)
    pixels[..., number % 3] += 120
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    write_webdataset(folder / "webdataset", samples=72, shard=20, picture=coloured)
    write_img2dataset(folder / "img2dataset", samples=48, shard=15, picture=coloured, classes=3)
    for name, samples in (("webdataset", 72), ("img2dataset", 48)):
        done = patchmill("shards", "index", name, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        assert (made["samples"], made["unlabelled"], made["classes"]) == (samples, 0, ["0", "1", "2"])
        checked = patchmill("shards", "verify", name, "--decode", cwd=folder)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    return folder


@pytest.mark.long
@pytest.mark.parametrize(("train", "val"), [("webdataset", "img2dataset"), ("img2dataset", "webdataset")])
def test_they_train(sets, tmp_path, train, val):
    (tmp_path / "c.toml").write_text(TRAIN.format(train=sets / train, val=sets / val))
    done = patchmill(
        "train", "c.toml", "duration=20 epochs", "global_batch=16", "optim.lr=3e-3", "--out", "run", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val"]["top1"] >= 0.6  # three colours: chance is a third
