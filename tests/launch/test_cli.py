"""Every mistake: one clear line on stderr, exit code 2, no traceback, nothing under a final name."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.cli import app
from tests.command import TRAIN, patchmill, refused
from tests.images import make_image_folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_image_folder(folder / "images")
    done = patchmill(
        "shards", "build", "images", "set", "--split", "val=0.25", "--shard-samples", "16", "--json", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(done.stdout)["parts"]
    assert parts["train"]["samples"] + parts["val"]["samples"] == 60
    return folder


def test_the_version_is_told(tmp_path):
    done = patchmill("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"patchmill {version('patchmill')}\n")


def test_stats_and_show(data, tmp_path):
    stats = json.loads(patchmill("shards", "stats", data / "set" / "train", "--json", cwd=tmp_path).stdout)
    assert [name for name, _ in stats["classes"]] == ["blue", "green", "red"]
    done = patchmill("shards", "show", data / "set" / "train", "sheet.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_bad_image_folders(tmp_path):
    def build(source: str) -> str:
        line = refused(patchmill("shards", "build", source, "out", "--workers", "1", cwd=tmp_path))
        assert not list(tmp_path.glob("out/**/dataset.json"))  # no data set; whole shards may stay for the next try
        assert not list(tmp_path.glob("out/**/*.partial"))
        return line

    assert "nowhere" in build("nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in build("empty")
    make_image_folder(tmp_path / "images", per_class=3)
    (tmp_path / "images" / "violet").mkdir()
    assert "violet" in build("images")
    (tmp_path / "images" / "violet" / "x.png").write_bytes((tmp_path / "images" / "red" / "000.png").read_bytes()[:100])
    line = build("images")
    assert "violet/x.png" in line
    assert "--max-rejected 1" in line


def test_rejected_images_are_listed_with_reasons(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_image_folder(tmp_path / "images", per_class=1, classes=("red",))
    for n in range(11):
        (tmp_path / f"images/red/x{n:02d}.png").write_bytes(b"")
    for command in (["build", "images", "out", "--max-rejected", "11"], ["merge", "out"]):
        done = CliRunner().invoke(app, ["shards", *command])
        assert done.exit_code == 0
        lines = done.stdout.splitlines()
        assert lines[0].startswith("all: 1 sample of 1 class in 1 shard, ")
        assert ", 11 images rejected: " in lines[0]
        listed = [line for line in lines if line.startswith("left out: red/x")]
        assert len(listed) == 10
        assert all(line.endswith(".png: empty file") for line in listed)
        assert lines[-1] == "left out: 11 images in all; --json lists them"


@pytest.mark.long
def test_bad_settings(data, tmp_path):
    (tmp_path / "c.toml").write_text(TRAIN.format(train=data / "set/train", val=data / "set/val"))

    def train(*over: str, **env: str) -> str:
        line = refused(patchmill("train", "c.toml", *over, "--out", "run", cwd=tmp_path, **env))
        assert not (tmp_path / "run").exists()
        return line

    assert "did you mean 'weight_decay'" in train("optim.weigth_decay=1")
    assert "does not divide over 5 ranks; set it to 10 or 15" in train(WORLD_SIZE="5", RANK="0")
    assert "no folder /nowhere" in train("data.train=/nowhere")
    assert "did you mean" in train("model.name=vit_b61")
    assert "c.toml: data.resolution 20 is not divisible by patch_size 8" in train("data.resolution=20")
    assert "there is no nothing.safetensors; give a checkpoint" in train("init=nothing.safetensors")
    assert "no settings file" in refused(patchmill("train", "d.toml", cwd=tmp_path))
    assert "no plan.toml" in refused(patchmill("report", "run", cwd=tmp_path))


@pytest.mark.long
def test_a_checkpoint_of_another_model(data, tmp_path):
    (tmp_path / "c.toml").write_text(TRAIN.format(train=data / "set/train", val=data / "set/val"))
    done = patchmill("train", "c.toml", "evaluate.view=center_crop", "--out", "run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["val"]["images"] > 0

    done = patchmill("convert", "run", "w.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    val = ("evaluate", "w.safetensors", data / "set" / "val", "--json")
    evaluated = patchmill(*val, "--view", "center_crop", "--out", "e", cwd=tmp_path)
    assert json.loads(evaluated.stdout)["loss"] != json.loads(patchmill(*val, cwd=tmp_path).stdout)["loss"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for key in ("loss", "top1", "top5", "images"):
        assert json.loads(evaluated.stdout)[key] == pytest.approx(last[f"val_{key}"])
    assert (tmp_path / "e" / "predictions.parquet").exists()

    again = ("train", "c.toml", "kind=finetune", "init=w.safetensors", "--out", "tuned")
    assert "its depth is 1, the settings say 2" in refused(patchmill(*again, "model.depth=2", cwd=tmp_path))
    line = refused(patchmill("train", "c.toml", "model.depth=2", "--out", "run", cwd=tmp_path))
    assert "model.depth changed from 1 to 2; set it back" in line
    assert "no whole latest checkpoint in" in refused(patchmill("convert", "tuned", "w2.safetensors", cwd=tmp_path))
    assert not (tmp_path / "w2.safetensors").exists()
