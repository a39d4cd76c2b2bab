"""Checkpoints once more in a bucket of a real S3 server: brought there, and gone on from; trouble with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from launch.local import free_port
from pipeline import checkpoint
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainSettings
from pipeline.lookout import Lookout
from pipeline.mirror import fetch_newer, whole
from pipeline.saver import Saver
from pipeline.settings import check, merge
from pipeline.train import train
from shards.build import build
from shards.errors import PatchmillError, StoppedOnRequestError, UserError
from shards.store import open_store
from tests.pipeline.test_lookout import TABLE, lines
from tests.shards.images import make_source

SHAPES = {"a": (10,)}
SETTINGS = {"duration": "9 steps", "global_batch": 8, "data": {"train": "-"}, "model": {"name": "vit_b16"}}

pytestmark = pytest.mark.usefixtures("alone")


def saver_of(folder: Path, mirror: str, keep_every: int | None = None) -> Saver:
    settings = check(TrainSettings, merge(SETTINGS, {"checkpoint": {"mirror": mirror}}), "test")
    return Saver(folder, SHAPES, settings, keep_every)


def save(saver: Saver, samples: int, best: bool = False) -> None:
    saver.save(samples, [("weight", "a", 0, torch.arange(10.0) + samples)], {"at": samples}, best)
    saver.finish()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bucket_has_what_the_disk_has(tmp_path, s3):
    folder = tmp_path / "run" / "checkpoints"
    with saver_of(folder, s3, keep_every=24) as saver:
        for samples in range(8, 65, 8):
            save(saver, samples, best=samples == 16)
            (tmp_path / "run" / "passed_over.json").write_text(f"[{samples}]")
    here = [path.name for path in checkpoint.whole_checkpoints(folder)]
    assert [int(name[-3:]) for name in here] == [64, 56, 48, 24, 16]
    store = open_store(s3)
    assert whole(store) == here
    assert store.read("latest") == b"samples-000000000064\n"
    assert store.read("best") == b"samples-000000000016\n"
    for name in here:
        assert {each: store.read(f"{name}/{each}") for each in store.list(name)} == content(folder / name)
    assert len(store.list("", below=True)) == 2 * len(here) + 3

    shutil.move(folder.parent, tmp_path / "lost")
    assert fetch_newer(s3, folder, -1)
    found = checkpoint.newest(folder)
    assert (found.samples, found.state) == (64, {"at": 64})
    assert content(found.path) == content(tmp_path / "lost" / "checkpoints" / found.path.name)
    assert (tmp_path / "run" / "passed_over.json").read_text() == "[56]"  # as it was at the last save
    assert not list(folder.glob(".*"))
    assert not fetch_newer(s3, folder, 64)  # what is here is as new


def test_what_is_broken_or_half_there_is_passed_over(tmp_path, s3, capsys):
    folder = tmp_path / "run" / "checkpoints"
    with saver_of(folder, s3) as saver:
        for samples in (8, 16):
            save(saver, samples)
    store = open_store(s3)
    store.write("samples-000000000024/rank-00000.safetensors", b"an upload that was killed")
    name = "samples-000000000016/rank-00000.safetensors"
    good = store.read(name)
    store.write(name, good[:-1] + b"?")
    assert whole(store) == ["samples-000000000016", "samples-000000000008"]
    assert fetch_newer(s3, tmp_path / "new" / "checkpoints", -1)
    assert "falling back to the one before" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "new" / "checkpoints").samples == 8
    store.write(name, good)
    (folder / name).unlink()
    assert checkpoint.newest(folder).samples == 8
    assert fetch_newer(s3, folder, 8)  # that in the bucket takes the place of the broken one
    Checkpoint(folder / "samples-000000000016").verify()


def test_trouble_with_the_store_ends_no_run_and_is_told_at_the_end(tmp_path, s3, monkeypatch, capsys, s3_server):
    monkeypatch.setenv("PATCHMILL_STORE_RETRY_SECONDS", "0")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(PatchmillError, match=r"nobody knows whether .* has a checkpoint to go on from: .*unset"):
        fetch_newer(s3, folder, -1)
    with saver_of(folder, s3) as saver:
        for samples in (8, 16):
            saver.save(samples, [("weight", "a", 0, torch.arange(10.0))], {})
            saver.wait()
        with pytest.raises(
            PatchmillError, match=rf"everything is saved in {folder}, but {s3} lacks some of it: .*run again"
        ):
            saver.finish()
    Checkpoint(folder / "samples-000000000016").verify()
    assert "tried again after the next save" in capsys.readouterr().err
    assert not fetch_newer(s3, folder, 16)
    assert "cannot be asked for newer checkpoints" in capsys.readouterr().err

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    with saver_of(folder, s3) as saver:  # the run is started again
        saver.finish()
    assert whole(open_store(s3)) == ["samples-000000000016", "samples-000000000008"]


def test_a_web_server_is_no_place_for_it(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\.mirror = .* is a plain web server"):
        saver_of(tmp_path, "http://127.0.0.1:9/x")


def test_a_run_goes_on_from_the_bucket_on_an_empty_disk(tmp_path, s3, monkeypatch, capsys):
    build(make_source(tmp_path / "source", classes=2, each=20), tmp_path / "set", shard_samples=13, workers=1)
    table = merge(TABLE, {"data": {"train": str(tmp_path / "set")}, "log_every": "1 step"})
    train(check(TrainSettings, table, "test"), tmp_path / "undisturbed")
    expected = lines(tmp_path / "undisturbed")

    real, taken = Lookout.look, []

    def stopped_at(self, now=False):
        seen = real(self, now)
        taken.append(seen)
        return seen._replace(stop=True) if len(taken) == 18 else seen

    monkeypatch.setattr(Lookout, "look", stopped_at)
    mirrored = check(TrainSettings, merge(table, {"checkpoint": {"mirror": s3}}), "test")
    with pytest.raises(StoppedOnRequestError):
        train(mirrored, tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    train(mirrored, tmp_path / "run")
    assert f"going on from {s3}/samples-000000000136" in capsys.readouterr().err
    assert lines(tmp_path / "run") == expected[17:]
    last = [checkpoint.newest(tmp_path / name / "checkpoints") for name in ("undisturbed", "run")]
    one, other = ((each.path / "rank-00000.safetensors").read_bytes() for each in last)
    assert one == other
    assert whole(open_store(s3))[0] == last[1].path.name
    heads = [json.loads((tmp_path / "run" / "checkpoints" / "samples-000000000192" / "checkpoint.json").read_text())]
    assert heads[0]["state"]["loader"]["ledger"] == "000001"  # not that of the run that was lost
