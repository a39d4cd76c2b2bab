"""The command, on real checkpoints of tiny stages."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.config import TrainSettings
from pipeline.figures.pictures import read_pictures
from pipeline.settings import check, merge
from pipeline.train import train
from shards.build import build
from shards.errors import UserError
from tests.command import patchmill, refused
from tests.shards.images import make_source

TABLE = {
    "duration": "2 steps", "global_batch": 4, "engine": {"kind": "accelerate"}, "data": {"resolution": 32},
    "model": {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    build(make_source(folder / "source", classes=2, each=6), folder / "set", shard_samples=5, workers=1)
    return folder


def stage(folder, name, **over):
    table = merge(merge(TABLE, {"data": {"train": str(folder / "set")}}), over)
    train(check(TrainSettings, table, "test"), folder / name)
    return folder / name


@pytest.mark.long
def test_every_figure_of_a_masked_patch_stage_and_its_bytes_are_the_same_again(folder, alone):
    run = stage(folder, "masked", kind="masked_patch")
    outs = []
    for out in ("one", "two"):
        done = patchmill("figures", run, "--images", folder / "set", "--out", folder / out, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        outs.append(json.loads(done.stdout))
    assert list(outs[0]) == ["filters", "positions", "distance", "rollout", "reconstruction"]
    for name, path in outs[0].items():
        data = (folder / "one" / f"{name}.png").read_bytes()
        assert path == str(folder / "one" / f"{name}.png")
        assert data == (folder / "two" / f"{name}.png").read_bytes()
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert min(pixels.shape[:2]) > 100
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is drawn


@pytest.mark.long
def test_what_cannot_be_drawn_is_said(folder, alone):
    run = stage(
        folder,
        "relative",
        kind="mae",
        model={"position": "sincos_2d_moco"},
        mae={"decoder_dim": 24, "decoder_heads": 3, "decoder_depth": 1},
    )
    done = patchmill("figures", run, "--out", folder / "few", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [name for name, path in found.items() if path.endswith(".png")] == ["filters", "positions"]
    for name in ("distance", "rollout", "reconstruction"):
        assert found[name] == "none: it wants images: give --images"
    assert sorted(each.name for each in (folder / "few").iterdir()) == ["filters.png", "positions.png"]


def test_no_images_in_a_folder(folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither images"):
        read_pictures(str(folder / "empty"), 8, 32)
    assert "there is no whole latest checkpoint" in refused(patchmill("figures", folder / "empty", cwd=folder))


def test_pictures_come_from_a_set_a_folder_or_a_file(folder):
    whole = read_pictures(str(folder / "set"), 99, 16)
    assert whole.shape == (12, 16, 16, 3)
    few = read_pictures(str(folder / "set"), 3, 16)
    assert [next(i for i, each in enumerate(whole) if (each == one).all()) for one in few] == [0, 5, 11]
    files = read_pictures(str(folder / "source"), 99, 16)
    assert sorted(each.tobytes() for each in files) == sorted(each.tobytes() for each in whole)
    file = next((folder / "source").rglob("*.png"))
    assert any((read_pictures(str(file), 99, 16)[0] == each).all() for each in whole)
