"""Building: bytes that depend on the input alone, kills, and everything that can be wrong with a source."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from shards import manifest
from shards.atomic import only_one
from shards.build import build, parse_split
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.store import open_store
from shards.tarwrite import TAR
from shards.verify import verify
from tests.shards.images import encode, make_source, tree

# Builds as a user's program would, and kills the build (not its workers) before rename number kill_at.
BUILD = """
import multiprocessing, os, signal, sys, time
from shards.build import build

source, out, workers, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rename, renames = os.replace, 0

def replace(old, new):
    global renames
    renames += 1
    worker = multiprocessing.parent_process() is not None
    if renames == kill_at and worker == (workers > 1):
        print(os.getpid(), flush=True)
        os.kill(os.getppid() if worker else os.getpid(), signal.SIGKILL)
        time.sleep(60)
    rename(old, new)

os.replace = replace
if __name__ == "__main__":
    build(source, out, shard_samples=4, workers=workers)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), classes=3, each=10)


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory):
    """Every file of an undisturbed build with one worker."""
    folder = tmp_path_factory.mktemp("reference")
    build(source, folder, shard_samples=4, workers=1)
    return folder


@pytest.fixture
def own(tmp_path):
    """A small source that a test may spoil."""
    return make_source(tmp_path / "source", classes=2, each=4)


def test_stock_webdataset_reads_it(reference):
    urls = sorted(str(path) for path in (reference / "shards").glob("*.tar"))
    ours = Dataset.open(reference)
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert len(samples) == 30
    for i, sample in enumerate(samples):
        mine = ours[i]
        assert sample["__key__"] == mine.key
        assert (sample["cls"],) == mine.labels
        shard, index = divmod(i, 4)
        rows = ours.rows(shard)
        assert sample[mine.format].size == (rows.width[index], rows.height[index])


def test_offsets_point_at_the_images_also_behind_long_names(tmp_path):
    for i in range(3):
        path = tmp_path / "source" / ("long class " * 15) / ("long folder " * 12) / f"{'ü' * 90}{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(i, "PNG"))
    build(tmp_path / "source", tmp_path / "out", workers=1)
    rows = Dataset.open(tmp_path / "out").rows(0)
    data = (tmp_path / "out/shards/000000.tar").read_bytes()
    found = [data[start : start + size] for start, size in zip(rows.offset, rows.size, strict=True)]
    assert sorted(found) == sorted(encode(i, "PNG") for i in range(3))
    with tarfile.open(tmp_path / "out/shards/000000.tar") as tar:
        members = {member.name for member in tar}
    assert members == {f"{key}.{extension}" for key in rows.key for extension in ("png", "cls")}


def test_rebuilt_elsewhere_by_two_workers_gives_the_same_bytes(source, reference, tmp_path):
    shutil.copytree(source, tmp_path / "moved")
    build(tmp_path / "moved", tmp_path / "out", shard_samples=4, workers=2)
    assert tree(tmp_path / "out") == tree(reference)


def test_classes_and_parts_are_mixed_over_the_shards(reference):
    dataset = Dataset.open(reference)
    order = [dataset[i].labels for i in range(30)]
    assert order != sorted(order)
    assert {labels[0] for shard in range(3) for labels in dataset.rows(shard).labels} == {0, 1, 2}


@pytest.mark.parametrize(
    ("workers", "kill_at"),
    [
        (1, 6),  # the third tar is there, its receipt is not
        (1, 18),  # all but dataset.json
        (2, 3),  # the second tar of one worker; both workers must end too
    ],
)
def test_killed_build_goes_on_and_ends_with_the_same_bytes(source, reference, tmp_path, workers, kill_at):
    out = tmp_path / "out"
    (tmp_path / "main.py").write_text(BUILD)
    command = [sys.executable, tmp_path / "main.py", source, out, str(workers), str(kill_at)]
    root = str(Path(__file__).parents[2])
    killed = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": root}, stdout=subprocess.PIPE, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    wait_until_gone(int(killed.stdout.split()[0]))

    assert not (out / manifest.DATASET).exists()
    with pytest.raises(UserError):
        Dataset.open(out)
    assert list(out.rglob(".*.partial"))
    finished = {path: path.stat().st_mtime_ns for path in (out / "manifest/samples").glob("0*.parquet")}
    assert finished
    build(source, out, shard_samples=4, workers=1)
    assert tree(out) == tree(reference)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not written again


def wait_until_gone(pid):
    """Wait until a process of another parent has ended."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.01)
    pytest.fail(f"worker {pid} lives on without its build")


def test_finished_build_is_left_alone(source, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = build(source, out, shard_samples=4, workers=1)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert (again.parts["all"].samples, again.parts["all"].shards) == (30, 8)


def test_lost_and_stale_shards_are_made_good(source, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    (out / manifest.shard_path(1)).unlink()
    (out / manifest.samples_path(2)).write_bytes(b"damaged")
    os.truncate(out / manifest.shard_path(3), 100)
    build(source, out, shard_samples=4, workers=1)
    assert tree(out) == tree(reference)


def test_image_replaced_by_one_of_the_same_size_is_seen(own, tmp_path):
    (own / "class.0/im.0.jpg").write_bytes(one := encode(5))
    build(own, tmp_path / "out", workers=1)
    other = next(data for data in map(encode, range(6, 10_000)) if len(data) == len(one))
    (own / "class.0/im.0.jpg").write_bytes(other)
    build(own, tmp_path / "out", workers=1)
    build(own, tmp_path / "fresh", workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_shard_written_anew_is_not_vouched_for_by_its_old_receipt(own, tmp_path, monkeypatch):
    out = tmp_path / "out"
    build(own, out, workers=1)
    path = own / "class.0/im.0.jpg"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1  # the same size
    path.write_bytes(data)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write_samples", killed)  # between tar and receipt
        with pytest.raises(Killed):
            build(own, out, workers=1)
    build(own, out, workers=1)
    build(own, tmp_path / "fresh", workers=1)
    assert tree(out) == tree(tmp_path / "fresh")


def test_drop_lists_never_move_to_other_samples(own, tmp_path):
    out = tmp_path / "out"
    build(own, out, workers=1)
    write_exclude(out, "v1", [(0, 3, "a copy of a test image")])
    shards = (out / manifest.SHARDS).read_bytes()
    (out / manifest.shard_path(0)).unlink()
    build(own, out, workers=1)  # the same bytes again
    assert Dataset.open(out, "v1").digest != Dataset.open(out).digest
    path = next(own.rglob("*.jpg"))
    path.write_bytes(bytes(path.stat().st_size))
    for _ in range(2):
        with pytest.raises(UserError, match=r"has drop lists \(v1\).* remove manifest/exclude"):
            build(own, out, workers=1, max_rejected=1)
        assert not (out / manifest.DATASET).exists()
    assert (out / manifest.SHARDS).read_bytes() == shards
    shutil.rmtree(out / manifest.EXCLUDE)
    build(own, out, workers=1, max_rejected=1)
    assert len(Dataset.open(out)) == 7


def test_classes_that_look_like_webdatasets_own_files_are_read_by_all(own, tmp_path):
    (own / "class.0").rename(own / "__unknown__")
    build(own, tmp_path / "out", workers=1)
    assert Dataset.open(tmp_path / "out").classes == ["__unknown__", "class.1"]
    assert verify(tmp_path / "out").faults == []
    urls = [str(path) for path in sorted((tmp_path / "out/shards").glob("*.tar"))]
    read = {sample["__key__"] for sample in wds.WebDataset(urls, shardshuffle=False)}
    assert len(read) == 8
    assert "_unknown__/im_0" in read


def test_nothing_of_an_unfinished_other_build_survives(source, reference, own, tmp_path):
    out = tmp_path / "out"
    build(source, out, shard_samples=1, workers=1)
    (out / manifest.DATASET).unlink()  # as if killed at the end
    (out / "shards/.000099.tar.partial").touch()
    build(source, out, shard_samples=4, workers=1)
    assert tree(out) == tree(reference)


def test_shards_by_bytes(source, tmp_path):
    build(source, tmp_path / "out", shard_bytes=4000, workers=1)
    dataset = Dataset.open(tmp_path / "out")
    rows = [dataset.rows(shard) for shard in range(len(dataset.shard_sizes))]
    sizes = [int(each.size.sum()) for each in rows]
    assert len(dataset) == 30
    assert len(sizes) > 1
    assert all(size <= 4000 or len(each) == 1 for size, each in zip(sizes, rows, strict=True))
    assert all(size + int(after.size[0]) > 4000 for size, after in zip(sizes, rows[1:], strict=False))


def test_split_makes_two_data_sets_and_adding_images_moves_none(tmp_path):
    source = make_source(tmp_path / "source", classes=4, each=25)
    first = build(source, tmp_path / "one", split={"val": 0.3}, workers=1)
    assert first.parts["train"].samples + first.parts["val"].samples == 100
    assert 15 <= first.parts["val"].samples <= 45  # 0.3 of 100, give or take three deviations

    def keys(out, part):
        dataset = Dataset.open(out / part)
        assert dataset.classes == [f"class.{i}" for i in range(4)]
        return {key for shard in range(len(dataset.shard_sizes)) for key in dataset.rows(shard).key}

    (source / "class.0" / "one_more.jpg").write_bytes(encode(77))
    build(source, tmp_path / "two", split={"val": 0.3}, workers=1, seed=5)
    for part in ("train", "val"):
        assert keys(tmp_path / "two", part) - {"class_0/one_more"} == keys(tmp_path / "one", part)


def test_other_files_and_hidden_ones_are_counted(own, tmp_path):
    (own / "class.0/notes.TXT").touch()
    (own / "class.1/Thumbs").touch()
    (own / "loose.jpg").write_bytes(encode(1))
    (own / "class.0/.hidden.jpg").touch()
    (own / ".git").mkdir()
    found = build(own, tmp_path / "out", workers=1)
    assert found.others == {".jpg": 1, ".txt": 1, "hidden": 1, "no extension": 1}
    assert found.classes == ["class.0", "class.1"]
    assert found.parts["all"].samples == 8


def test_lying_extension_gets_the_true_format(own, tmp_path):
    (own / "class.0/liar.jpg").write_bytes(encode(3, "PNG"))
    build(own, tmp_path / "out", workers=1)
    dataset = Dataset.open(tmp_path / "out")
    assert {sample.key: sample.format for sample in map(dataset.__getitem__, range(9))}["class_0/liar"] == "png"


def test_broken_images_are_named_then_left_out_on_request(own, tmp_path):
    (own / "class.0/cut.jpg").write_bytes(encode(1)[:-40])
    (own / "class.1/empty.png").touch()
    out = tmp_path / "out"
    for allowed in (0, 1):
        with pytest.raises(UserError, match=r"2 broken images .* so far") as caught:
            build(own, out, workers=1, max_rejected=allowed)
        for part in ("class.0/cut.jpg (cut short", "class.1/empty.png (empty file)", "--max-rejected 2"):
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (out / manifest.DATASET).exists()
        assert not list(out.rglob(".*"))
    result = build(own, out, workers=1, max_rejected=2)
    expected = [("class.0/cut.jpg", "cut short: no end marker"), ("class.1/empty.png", "empty file")]
    assert sorted(result.parts["all"].rejected) == expected
    assert sorted(manifest.read_receipt(open_store(out), manifest.samples_path(0)).rejected) == expected
    assert len(Dataset.open(out)) == 8
    whole = tree(out)
    with pytest.raises(UserError, match=r"2 broken images .* --max-rejected 2"):
        build(own, out, workers=1, max_rejected=1)  # a finished one
    assert len(Dataset.open(out)) == 8
    build(own, out, workers=1, max_rejected=2)
    assert tree(out) == whole  # no building.json either


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_damage_that_no_header_shows_is_found_by_decoding(tmp_path, suffix):
    rng = np.random.default_rng(0)
    folder = tmp_path / "images" / "noise"
    folder.mkdir(parents=True)
    for index in range(3):
        pixels = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        pixels.save(folder / f"{index}.{suffix}", quality=90)
    victim = folder / f"1.{suffix}"
    data = bytearray(victim.read_bytes())
    if suffix == "jpg":
        data[len(data) // 2 : len(data) // 2 + 20] = b"\xff\xda" * 10  # scans that begin in the middle of one
    else:
        data[30:60] = b"\xff" * 30  # sizes of partitions that reach behind the end
    victim.write_bytes(data)
    with pytest.raises(UserError, match=rf"1 broken image .*noise/1\.{suffix}"):
        build(tmp_path / "images", tmp_path / "out", decode=True)
    assert not (tmp_path / "out" / manifest.DATASET).exists()
    assert build(tmp_path / "images", tmp_path / "out", decode=True, max_rejected=1).parts["all"].samples == 2


def no_folder(source):
    shutil.rmtree(source)


def empty(source):
    shutil.rmtree(source)
    source.mkdir()


def empty_class(source):
    (source / "zebra/deep").mkdir(parents=True)
    (source / "zebra/deep/readme.txt").touch()


def loose_files(source):
    empty(source)
    (source / "a.jpg").write_bytes(encode(0))


def same_key(source):
    (source / "class.0/im_0.png").write_bytes(encode(0, "PNG"))


def dangling_class(source):
    (source / "class.00").symlink_to("/an/unmounted/disk")


def dangling_link(source):
    (source / "class.0/link.jpg").symlink_to("nowhere.jpg")


def name_not_utf8(source):
    (source / os.fsdecode(b"class.0/\xff.jpg")).write_bytes(encode(0))


def all_broken(source):
    for path in source.rglob("im.*"):
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_folder, "no folder .*source"),
        (empty, "source is empty"),
        (empty_class, "class folder zebra .*no images"),
        (loose_files, "1 images but no class folders"),
        (same_key, r"class\.0/im\.0\.jpg and class\.0/im_0\.png"),
        (dangling_link, r"cannot read .*link\.jpg"),
        (dangling_class, r"cannot read .*class\.00: it is a link to nowhere"),
        (name_not_utf8, "not UTF-8"),
        (all_broken, "every image .* broken"),
    ],
)
def test_bad_sources(own, tmp_path, spoil, message):
    spoil(own)
    with pytest.raises(UserError, match=message) as caught:
        build(own, tmp_path / "out", workers=1, max_rejected=100)
    assert "; " in str(caught.value)  # and a remedy
    str(caught.value).encode()  # can be printed
    assert not list((tmp_path / "out").rglob("dataset.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shard_samples": 0}, "--shard-samples 0"),
        ({"shard_bytes": 0}, "--shard-bytes 0"),
        ({"workers": 0}, "--workers 0"),
        ({"max_rejected": -1}, "--max-rejected -1"),
        ({"split": {"val": 1.0}}, "--split val=1.0"),
        ({"split": {"train": 0.5}}, "--split train=0.5"),
        ({"split": {"a/b": 0.5}}, "--split a/b=0.5"),
        ({"split": {"val": 0.5, "test": 0.5}}, "add up to 1"),
        ({"split": {"val": 1e-9}}, "no image for val"),
    ],
)
def test_bad_settings(own, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        build(own, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_parse_split():
    assert parse_split("val=0.1") == {"val": 0.1}
    assert parse_split("val=0.1,test=.05") == {"val": 0.1, "test": 0.05}
    for text in ("val", "val=x", "val=0.1=2", "", "val=nan", "val=2", "val=0.1,val=0.2"):
        with pytest.raises(UserError, match="--split"):
            parse_split(text)


def test_output_of_something_else_is_left_alone(own, source, reference, tmp_path):
    out = shutil.copytree(reference, tmp_path / "out")
    for other, settings, differs in [
        (own, {"shard_samples": 4}, "images, classes"),
        (source, {"shard_samples": 5}, "shard_samples"),
        (source, {"shard_samples": 4, "seed": 1}, "seed"),
        (source, {"shard_samples": 4, "split": {"val": 0.5}}, "out already holds another data set"),
    ]:
        with pytest.raises(UserError, match=f"{differs}.*another folder"):
            build(other, out, workers=1, **settings)
        assert tree(out) == tree(reference)
    with pytest.raises(UserError, match="lies in the source"):
        build(own, own / "class.0", workers=1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        build(own, tmp_path / "file", workers=1)
    (tmp_path / "theirs/shards").mkdir(parents=True)
    (tmp_path / "theirs/shards/000000.tar").write_text("mine")
    with pytest.raises(UserError, match="no build of ours"):
        build(own, tmp_path / "theirs", workers=1)
    assert (tmp_path / "theirs/shards/000000.tar").read_text() == "mine"


def test_unsplit_build_into_a_split_one_is_refused(own, tmp_path):
    build(own, tmp_path / "out", split={"val": 0.4}, workers=1)
    with pytest.raises(UserError, match="already holds another data set"):
        build(own, tmp_path / "out", workers=1)


def test_two_builds_into_one_folder_are_refused(own, tmp_path):
    with only_one(tmp_path / "out", "build"), pytest.raises(UserError, match="another build is writing"):
        build(own, tmp_path / "out", workers=1)
    build(own, tmp_path / "out", workers=1)


def test_tars_tell_nothing_of_the_machine(reference):
    with tarfile.open(reference / manifest.shard_path(0)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
            assert (member.uname, member.gname) == (TAR["user"], TAR["group"])


def test_progress_goes_to_stderr(own, tmp_path, capfd):
    build(own, tmp_path / "out", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "8/8" in err
    assert "images/s" in err
