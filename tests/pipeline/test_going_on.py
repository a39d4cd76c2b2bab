"""Going on from the end of a finished run, and from another run's checkpoint; from one that does not fit."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from pipeline import checkpoint, distributed
from pipeline.config import TrainSettings
from pipeline.settings import check, merge
from pipeline.train import train
from shards.atomic import only_one
from shards.build import build
from shards.errors import PatchmillError, UserError
from tests.pipeline.test_lookout import TABLE, lines
from tests.shards.images import make_source

pytestmark = pytest.mark.usefixtures("alone")
CONSTANT = {"schedule": {"shape": "linear", "end_lr": 1e-3}, "log_every": "1 step", "track": {"tensorboard": False}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build(make_source(folder / "source", classes=2, each=20), folder / "set", shard_samples=13, workers=1)
    return folder / "set"


def run(out: Path, data: Path, duration: str, **over) -> dict:
    table = merge(merge(TABLE, CONSTANT), {"data": {"train": str(data)}, "duration": duration})
    return train(check(TrainSettings, merge(table, over), "test"), out)


def weights(out: Path) -> bytes:
    return (checkpoint.newest(out / "checkpoints").path / "rank-00000.safetensors").read_bytes()


def test_a_finished_run_is_extended_and_another_goes_on_from_its_checkpoint(tmp_path, data, capsys):
    run(tmp_path / "whole", data, "8 steps")
    expected = lines(tmp_path / "whole")
    first = tmp_path / "first"
    run(first, data, "4 steps")
    assert lines(first) == expected[:4]
    shutil.copytree(first, tmp_path / "second")
    assert run(first, data, "4 steps")["samples"] == 32  # it is finished, and stays so
    run(first, data, "8 steps")
    assert "duration changed from '4 steps' to '8 steps'" in capsys.readouterr().err
    assert lines(first) == expected
    assert weights(first) == weights(tmp_path / "whole")

    other = tmp_path / "other"
    run(other, data, "8 steps", resume=str(tmp_path / "second"))
    told = capsys.readouterr().err
    assert f"going on from {tmp_path}/second/checkpoints/samples-000000000032, of another run" in told
    assert lines(other) == expected[4:]
    assert weights(other) == weights(tmp_path / "whole")
    state = json.loads((checkpoint.newest(other / "checkpoints").path / "checkpoint.json").read_text())
    assert state["state"]["loader"]["ledger"] == "000001"  # 000000 is the other run's
    run(other, data, "9 steps", resume=str(tmp_path / "gone"))  # its own goes first
    assert len(lines(other)) == 5
    assert "of another run" not in capsys.readouterr().err


def test_of_two_jobs_in_one_folder_the_second_refuses(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "only_one", partial(only_one_at_once, 0.3))
    told = r"another training run is writing to .*run; wait for it or stop it"
    first, second = (distributed.alone_in(tmp_path / "run") for _ in range(2))
    with first, pytest.raises(UserError, match=told), second:
        pass
    with distributed.alone_in(tmp_path / "run"):
        pass


def only_one_at_once(seconds: float, folder: Path, doing: str, wait: float):
    """Wait less than the minute that ranks of a launcher that was killed get."""
    assert wait == 60
    return only_one(folder, doing, wait=seconds)


def test_what_does_not_fit_is_one_clear_line(tmp_path, data):
    run(tmp_path / "first", data, "2 steps")
    source = str(tmp_path / "first" / "checkpoints" / "samples-000000000016")
    with pytest.raises(UserError, match=r"cannot go on from .*: model\.depth changed from 1 to 2; set it back"):
        run(tmp_path / "second", data, "4 steps", resume=source, model={"depth": 2})
    build(make_source(tmp_path / "source", classes=2, each=19), tmp_path / "other", shard_samples=13, workers=1)
    with pytest.raises(UserError, match="the samples are others than those of the checkpoint"):
        run(tmp_path / "second", tmp_path / "other", "4 steps", resume=source)
    with pytest.raises(UserError, match=r"resume = .*nowhere' has no whole checkpoint; give one"):
        run(tmp_path / "second", data, "4 steps", resume=str(tmp_path / "nowhere"))
    assert not list(tmp_path.glob("second/checkpoints/samples-*"))


def test_with_every_checkpoint_broken_it_does_not_start_from_scratch(tmp_path, data, capsys):
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    over = {"checkpoint": {"every": "2 steps", "mirror": str(mirror)}}
    run(out, data, "8 steps", **over)
    expected = weights(out)
    folders = checkpoint.whole_checkpoints(out / "checkpoints")
    files = [path / "rank-00000.safetensors" for path in (*folders, *map(Path, mirror.glob("samples-*")))]
    for file in files:
        file.rename(file.with_suffix(".kept"))
    names = r".*run/checkpoints/samples-0+16, .*samples-0+64, .*mirror/samples-0+64, .*mirror/samples-0+16"
    told = rf"none of the checkpoints of this run is whole: {names}; put their files back, give another --out, or del"
    capsys.readouterr()
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            run(out, data, "8 steps", **over)
        assert capsys.readouterr().err.count("falling back") == 2 * (len(folders) - 1)
    with pytest.raises(UserError, match=r"none of .* is whole: .*run/checkpoints/samples-0+64; put"):
        run(out, data, "8 steps", checkpoint={"every": "2 steps"})
    assert sorted(checkpoint.whole_checkpoints(out / "checkpoints"), reverse=True) == folders
    for file in files:
        file.with_suffix(".kept").rename(file)
    assert run(out, data, "8 steps", **over)["samples"] == 64
    assert weights(out) == expected

    for path in folders:
        (path / "checkpoint.json").unlink()
    with pytest.raises(UserError, match="none of the checkpoints of this run is whole"):
        run(out, data, "8 steps", checkpoint={"every": "2 steps"})


def test_of_another_runs_mirror_nothing_is_fetched(tmp_path, data):
    mirror = tmp_path / "mirror"
    run(tmp_path / "first", data, "4 steps", checkpoint={"mirror": str(mirror)})
    told = rf"cannot go on from {mirror}/samples-.*: seed changed from 0 to 7; .*another mirror"
    with pytest.raises(UserError, match=told):
        run(tmp_path / "second", data, "4 steps", seed=7, checkpoint={"mirror": str(mirror)})
    assert not list((tmp_path / "second").rglob("*samples*"))
    assert run(tmp_path / "second", data, "2 steps", seed=7)["samples"] == 16


def test_latest_is_what_a_run_went_on_from(tmp_path, data):
    """Else what is broken would be brought to the mirror as the newest."""
    out, mirror = tmp_path / "run", tmp_path / "mirror"
    run(out, data, "4 steps", checkpoint={"every": "2 steps"})
    file = out / "checkpoints" / "samples-000000000032" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    run(out, data, "2 steps", checkpoint={"mirror": str(mirror)})
    assert checkpoint.pointer(out / "checkpoints", "latest").name == "samples-000000000016"
    assert [path.name for path in mirror.glob("samples-*")] == ["samples-000000000016"]


@pytest.fixture
def stdin():
    """Lets a file be the standard input of this process."""
    before = os.dup(0)

    def read_from(path: Path) -> None:
        file = os.open(path, os.O_RDONLY)
        os.dup2(file, 0)
        os.close(file)

    yield read_from
    os.dup2(before, 0)
    os.close(before)


def test_of_data_that_ends_it_says_that_it_is_saved_only_once_it_is(tmp_path, data, stdin, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    ends = {"data": {"train": "-", "val": str(data)}, "duration": "8 steps", "evaluate": {"every": "9 steps"}}
    settings = check(TrainSettings, merge(merge(TABLE, CONSTANT), ends), "test")
    stdin(data / "shards" / "000000.tar")
    with pytest.raises(UserError, match=r"ended at 8 of 64 samples, saved in .*/samples-0+8; give it more"):
        train(settings, tmp_path / "run")
    stdin(data / "shards" / "000000.tar")
    monkeypatch.setattr(checkpoint, "write_rank_file", full)
    with pytest.raises(PatchmillError, match=r"cannot write checkpoint .*samples-0+8: .*No space left"):
        train(settings, tmp_path / "full")
