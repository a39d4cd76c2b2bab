"""Checkpoints once more in a bucket of a real S3 server: brought there, and gone on from; trouble with it."""

import json
import shutil
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from launch.local import free_port
from pipeline import checkpoint, mirror
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainSettings
from pipeline.lookout import Lookout
from pipeline.mirror import whole
from pipeline.saver import Saver
from pipeline.settings import check, merge
from pipeline.train import train
from shards.build import build
from shards.errors import PatchmillError, StoppedOnRequestError, UserError
from shards.localstore import LocalStore
from shards.store import open_store
from tests.pipeline.indices import with_changes
from tests.pipeline.test_lookout import TABLE, lines
from tests.ranks import ends_of_ranks
from tests.shards.images import make_source

WORKER = Path(__file__).with_name("worker_mirror.py")
SHAPES = {"a": (10,)}
SETTINGS = {"duration": "9 steps", "global_batch": 8, "data": {"train": "-"}, "model": {"name": "vit_b16"}}

pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def data(tmp_path) -> Path:
    build(make_source(tmp_path / "source", classes=2, each=20), tmp_path / "set", shard_samples=13, workers=1)
    return tmp_path / "set"


def saver_of(folder: Path, mirror: str, keep_every: int | None = None) -> Saver:
    settings = check(TrainSettings, merge(SETTINGS, {"checkpoint": {"mirror": mirror}}), "test")
    return Saver(folder, SHAPES, settings, keep_every)


def save(saver: Saver, samples: int, best: bool = False) -> None:
    saver.save(samples, [("weight", "a", 0, torch.arange(10.0) + samples)], {"at": samples}, best)
    saver.finish()


def fetch_newer(url: str, folder: Path, samples: int) -> str | None:
    return mirror.fetch_newer(url, folder, samples, lambda state, where: None)[0]


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


def test_a_run_goes_on_from_the_bucket_on_an_empty_disk(tmp_path, data, s3, monkeypatch, capsys):
    table = merge(TABLE, {"data": {"train": str(data)}, "log_every": "1 step"})
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


CHANGES = ("upload", "write", "delete")  # the calls that change a store


@pytest.fixture
def calls(monkeypatch):
    """What happens at each call that changes a store in a folder: functions of the call's name and arguments."""
    watching = []

    def watched(name: str):
        real = getattr(LocalStore, name)

        def call(self, *arguments):
            for each in watching:
                each(name, *arguments)
            return real(self, *arguments)

        return call

    for name in CHANGES:
        monkeypatch.setattr(LocalStore, name, watched(name))
    return watching


def samples_in(folder: Path) -> list[int]:
    """Return what a mirror in a folder has, oldest first, after checking that each file of it is whole."""
    names = sorted(whole(LocalStore(folder)))
    for name in names:
        Checkpoint(folder / name).verify()
    return [checkpoint.samples_of(Path(name)) for name in names]


def pointed(folder: Path) -> list[int | None]:
    found = [checkpoint.pointer(folder, name) for name in ("latest", "best")]
    return [path and checkpoint.samples_of(path) for path in found]


def saved(tmp_path: Path, *samples: int, best: int = 0, keep_every: int | None = None) -> tuple[Path, Path]:
    """Save so often; return the folders of the checkpoints and of their mirror."""
    folder, store = tmp_path / "run" / "checkpoints", tmp_path / "mirror"
    with saver_of(folder, str(store), keep_every) as saver:
        for each in samples:
            save(saver, each, each == best)
    return folder, store


@pytest.mark.long
def test_whenever_it_dies_what_the_mirror_has_is_whole_and_the_next_start_brings_the_rest(tmp_path, calls):
    folder, store = tmp_path / "run" / "checkpoints", tmp_path / "mirror"
    saved(tmp_path, 8, 16, best=8)
    for dies in range(1, 100):
        shutil.rmtree(folder.parent)
        shutil.rmtree(store)
        calls.clear()
        saved(tmp_path, 8, 16, best=8)
        count = []

        def dead(*_, count=count, dies=dies):
            samples_in(store)
            count.append(1)
            if len(count) >= dies:
                raise PatchmillError("dead")

        calls.append(dead)
        with saver_of(folder, str(store)) as saver:
            for samples in (24, 16, 32):  # the second over one that is there
                saver.save(samples, [("weight", "a", 0, torch.arange(10.0) - samples)], {"at": -samples}, samples == 24)
                with suppress(PatchmillError):
                    saver.finish()
        samples_in(store)
        calls.clear()
        with saver_of(folder, str(store)) as saver:
            saver.finish()
        here = sorted(map(checkpoint.samples_of, checkpoint.whole_checkpoints(folder)))
        assert samples_in(store) == here == [24, 32]
        assert pointed(store) == [32, 24]
        for each in here:
            name = f"samples-{each:012d}"
            assert content(store / name) == content(folder / name)
        if len(count) < dies:
            break
    assert dies > 20


def test_an_object_that_is_not_as_long_as_its_file_is_told_and_brought_again(tmp_path, monkeypatch, calls, capsys):
    real, short = LocalStore.upload, []

    def upload(self, path, file):
        real(self, path, file)
        if path.endswith("safetensors") and not short:
            short.append((self._root / path).write_bytes(file.read_bytes()[:-1]))

    monkeypatch.setattr(LocalStore, "upload", upload)
    store = tmp_path / "mirror"
    calls.append(lambda *_: samples_in(store))
    saved(tmp_path, 8)
    assert short
    assert "bytes, and not" in capsys.readouterr().err
    assert samples_in(store) == [8]


def test_what_is_on_its_way_is_not_deleted(tmp_path, calls):
    begun, gone_on = threading.Event(), threading.Event()

    def slow(name, path, *_):
        if name == "upload" and path.startswith("samples-000000000008/"):
            begun.set()
            assert gone_on.wait(30)

    calls.append(slow)
    folder = tmp_path / "run" / "checkpoints"
    with saver_of(folder, str(tmp_path / "mirror")) as saver:
        for samples in (8, 16, 24, 32):
            saver.save(samples, [("weight", "a", 0, torch.arange(10.0))], {})
            saver.wait()
            assert begun.wait(30)
        here = sorted(map(checkpoint.samples_of, checkpoint.whole_checkpoints(folder)))
        gone_on.set()
        saver.finish()
    assert here == [8, 24, 32]
    assert samples_in(tmp_path / "mirror") == [24, 32]


def test_the_next_try_brings_only_what_the_one_before_did_not(tmp_path, calls):
    folder, store = tmp_path / "run" / "checkpoints", tmp_path / "mirror"
    uploads, broken_off = [], []

    def note(name, path, *_):
        if name == "upload" and path.endswith("safetensors"):
            if path.endswith("1.safetensors") and broken_off:
                raise PatchmillError(broken_off.pop(0))
            uploads.append(path[-13:-12])

    path = checkpoint.save(folder, 8, [("weight", "a", 0, torch.arange(10.0))], SHAPES, {})
    index = path / "checkpoint.json"
    (file,) = json.loads(index.read_text())["files"]
    shutil.copy(path / "rank-00000.safetensors", path / "rank-00001.safetensors")
    index.write_text(with_changes(index, {"files": [file, file | {"name": "rank-00001.safetensors"}]}))
    calls.append(note)
    broken_off += ["at once", "and at the end"]
    with saver_of(folder, str(store)) as saver, pytest.raises(PatchmillError, match="lacks some of it: and at the end"):
        saver.finish()
    assert (samples_in(store), uploads) == ([], ["0"])
    with saver_of(folder, str(store)) as saver:  # started again
        saver.finish()
    assert (samples_in(store), uploads) == ([8], ["0", "1"])
    # Another one of the same name: nothing of the one before is of use, however long it is.
    uploads.clear()
    broken_off.append("once more")
    index.write_text(with_changes(index, {"state": {"another": 1}}))
    with saver_of(folder, str(store)) as saver:
        saver.finish()
    assert (samples_in(store), uploads) == ([8], ["0", "1"])
    assert sorted(content(store / path.name)) == sorted(content(path))


def test_going_on_from_it_brings_the_best_along_and_it_stays(tmp_path):
    folder, store = saved(tmp_path, 8, 16, 24, best=8)
    assert (samples_in(store), pointed(store)) == ([8, 16, 24], [24, 8])
    shutil.rmtree(folder.parent)
    assert fetch_newer(str(store), folder, -1) == "samples-000000000024"
    assert sorted(map(checkpoint.samples_of, checkpoint.whole_checkpoints(folder))) == [8, 24]
    assert pointed(folder)[1] == 8
    saved(tmp_path, 32, 40)
    assert (samples_in(store), pointed(store)) == ([8, 32, 40], [40, 8])

    shutil.rmtree(folder.parent)
    name = "samples-000000000008/rank-00000.safetensors"
    (store / name).write_bytes((store / name).read_bytes()[:-1] + b"?")
    fetch_newer(str(store), folder, -1)  # without the best, which is broken
    saved(tmp_path, 48)
    assert sorted(whole(LocalStore(store))) == [f"samples-{each:012d}" for each in (8, 40, 48)]
    assert pointed(store) == [48, 8]


def test_what_is_newer_in_it_is_left_alone_until_the_run_has_passed_it(tmp_path):
    folder, store = saved(tmp_path, 8, 16, 24, 32)
    for samples in (24, 32):
        shutil.rmtree(folder / f"samples-{samples:012d}")
    saved(tmp_path, 8, 16, 20)  # while nobody knew of what the mirror has: it could not be asked, say
    assert (samples_in(store), pointed(store)) == ([16, 20, 24, 32], [20, None])
    saved(tmp_path, 40)
    assert samples_in(store) == [32, 40]


def test_other_names_in_it_are_not_looked_at(tmp_path):
    _, store = saved(tmp_path, 8, 16)
    for name in ("samples-old", "samples-12", "samples-0000000000xx"):
        (store / name).mkdir()
        (store / name / "checkpoint.json").write_text("{}")
    saved(tmp_path, 24)
    assert whole(LocalStore(store)) == ["samples-000000000024", "samples-000000000016"]
    assert fetch_newer(str(store), tmp_path / "new", -1) == "samples-000000000024"


def test_whatever_it_fails_of_is_told(tmp_path, calls, capsys):
    folder, store = saved(tmp_path, 8, 16)

    def wrong(*_):
        raise KeyError("files")

    calls.append(wrong)
    told = r"but .*mirror lacks some of it: KeyError\('files'\); mend that"
    with saver_of(folder, str(store)) as saver, pytest.raises(PatchmillError, match=told):
        save(saver, 24)
    assert "warning: the checkpoints in" in capsys.readouterr().err


def test_one_that_is_broken_on_disk_is_told_and_keeps_no_other_from_it(tmp_path, capsys):
    folder, store = saved(tmp_path, 8, 16, 24, keep_every=8)
    shutil.rmtree(store)
    (folder / "samples-000000000008" / "checkpoint.json").write_text('{"files": [')
    file = folder / "samples-000000000016" / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(PatchmillError, match=r"lacks some of it: .*000016/.* does not have the checksum"):
        saved(tmp_path, 32, keep_every=8)
    assert samples_in(store) == [24, 32]


def test_files_of_a_fetch_that_was_broken_off_are_kept_if_they_are_right(tmp_path, monkeypatch):
    folder, store = saved(tmp_path, 8)
    name, fetched, real = "samples-000000000008", [], LocalStore.stream
    expected = content(folder / name)
    monkeypatch.setattr(LocalStore, "stream", lambda self, path: fetched.append(path) or real(self, path))
    for left, again in ((expected["rank-00000.safetensors"], 0), (b"x" * 40, 1), (b"", 1)):
        new = tmp_path / f"new-{len(left)}-{again}"
        partial = new / f".{name}.partial"
        partial.mkdir(parents=True)
        (partial / "rank-00000.safetensors").write_bytes(left)
        (partial / "rank-00001.safetensors").write_bytes(b"of a save by more ranks")
        (partial / ".rank-00000.safetensors.partial").write_bytes(b"cut short")
        fetched.clear()
        assert fetch_newer(str(store), new, -1)
        assert len(fetched) == again
        assert content(new / name) == expected


def test_nothing_is_written_outside_the_folder(tmp_path, capsys):
    _, store = saved(tmp_path, 8, 16)
    index = store / "samples-000000000016" / "checkpoint.json"
    (file,) = json.loads(index.read_text())["files"]
    index.write_text(with_changes(index, {"files": [file | {"name": "../../../stolen"}]}))
    shutil.copy(store / "samples-000000000016" / "rank-00000.safetensors", tmp_path / "stolen")
    (tmp_path / "new").mkdir()
    assert fetch_newer(str(store), tmp_path / "new" / "run" / "checkpoints", -1) == "samples-000000000008"
    assert "it names a file '../../../stolen'; use another checkpoint (falling back" in capsys.readouterr().err
    found = sorted(each.name for each in (tmp_path / "new").rglob("*") if each.is_file())
    assert found == ["checkpoint.json", "rank-00000.safetensors"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("how", "code", "samples"), [("end", 0, 48), pytest.param("stop", 75, 24, marks=pytest.mark.slow)]
)
def test_bringing_may_take_longer_than_anything_else(tmp_path, data, how, code, samples):
    (end,) = ends_of_ranks(WORKER, 1, tmp_path, how)
    assert end.code == code, end.stderr
    assert samples_in(tmp_path / "mirror") == [samples]


@pytest.mark.long
def test_a_fetch_may_take_longer_than_ranks_wait_for_each_other(tmp_path, data):
    table = merge(TABLE, {"data": {"train": str(data)}, "checkpoint": {"mirror": str(tmp_path / "mirror")}})
    train(check(TrainSettings, merge(table, {"duration": "2 steps", "global_batch": 12}), "test"), tmp_path / "lost")
    ends = ends_of_ranks(WORKER, 2, tmp_path, "fetch")
    assert [end.code for end in ends] == [0, 0], [end.stderr for end in ends]
    assert "going on from" in ends[0].stderr
    assert samples_in(tmp_path / "mirror") == [24, 48]
