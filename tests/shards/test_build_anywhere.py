"""Builds from and into buckets, bad images of every sort, and disks that fill up."""

import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from shards import manifest
from shards.build import build
from shards.dataset import Dataset
from shards.decode import decode
from shards.encode import Encoding
from shards.errors import PatchmillError, UserError
from shards.merge import merge
from shards.plan import Slice
from shards.store import open_store
from tests.shards.images import encode, make_source, tree
from tests.shards.sources.servers import answering, serve, upload
from tests.shards.sources.test_cifar import archive, files
from tests.shards.sources.test_parquet import write as write_parquet


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_source(tmp_path_factory.mktemp("source"), classes=2, each=8)


def download(url):
    """Every object of a data set, by its name."""
    store = open_store(url)
    names = [f"{below}/{name}" for below in ("shards", "manifest", "manifest/samples") for name in store.list(below)]
    return {name: store.read(name) for name in names}


def test_from_a_bucket_into_a_bucket(source, s3, tmp_path):
    build(source, tmp_path / "out", shard_samples=5, workers=1)
    upload(source, f"{s3}/images")
    build(f"{s3}/images", f"{s3}/sets/one", shard_samples=5, workers=2)
    assert download(f"{s3}/sets/one") == tree(tmp_path / "out")
    assert len(Dataset.open(f"{s3}/sets/one")) == 16
    before = open_store(f"{s3}/sets/one").modified(manifest.shard_path(0))
    build(f"{s3}/images", f"{s3}/sets/one", shard_samples=5, workers=1)  # all there
    assert open_store(f"{s3}/sets/one").modified(manifest.shard_path(0)) == before
    with pytest.raises(UserError, match="already holds another data set"):
        build(f"{s3}/images", f"{s3}/sets/one", shard_samples=4, workers=1)


def test_slices_into_a_bucket_and_a_lost_shard(source, s3, tmp_path):
    build(source, tmp_path / "out", shard_samples=5, workers=1)
    for index in range(2):
        build(source, f"{s3}/set", shard_samples=5, workers=1, own=Slice(index, 2))
    open_store(f"{s3}/set").delete(manifest.shard_path(1))
    with pytest.raises(UserError, match=r"1 of 4 shards are not built yet.*000001\.tar"):
        merge(f"{s3}/set")
    build(source, f"{s3}/set", shard_samples=5, workers=1, own=Slice(1, 2))
    assert merge(f"{s3}/set").parts["all"].samples == 16
    assert download(f"{s3}/set") == tree(tmp_path / "out")


def bomb():
    """A whole JPEG whose header claims 65,000 × 65,000 pixels."""
    data = bytearray(encode(1))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (65000).to_bytes(2, "big") * 2
    return bytes(data)


def no_pixels():
    """A PNG with a header and an end, and nothing between them."""
    data = encode(1, "PNG")
    return data[:33] + data[-12:]


def saved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
BROKEN = {
    "empty.jpg": (b"", "empty file"),
    "cut.jpg": (encode(1)[:-30], "cut short: no end marker"),
    "cut2.png": (encode(1, "PNG")[:-30], "runcated"),
    "cut3.webp": (encode(1, "WEBP")[:-30], "cut short"),
    "nothing.png": (no_pixels(), "index out of range"),
    "text.jpg": (b"<html>not found</html>", "not a jpg, png or webp image"),
    "gif.png": (saved(NOISE, "GIF"), "not a jpg, png or webp image"),
    "bomb.jpg": (bomb(), "4,225,000,000 pixels"),
}
ODD = {  # fine, though unusual: name, content, format
    "liar.png": (encode(2), "jpg"),
    "cmyk.jpg": (saved(NOISE.convert("CMYK"), "JPEG"), "jpg"),
    "deep.png": (saved(Image.fromarray((np.arange(1200).reshape(30, 40) * 54).astype(np.uint16)), "PNG"), "png"),
    "animated.webp": (saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(90)]), "webp"),
    "animated2.png": (saved(NOISE, "PNG", save_all=True, append_images=[NOISE.rotate(90)]), "png"),
    "palette.png": (saved(NOISE.convert("P"), "PNG", transparency=0), "png"),
    "a name with spaces.jpg": (encode(3), "jpg"),
    "many.dots.in.it.jpg": (encode(4), "jpg"),
    "Ünïcödé 日本.jpg": (encode(5), "jpg"),
    "'quoted\" $(x) ;%20#.jpg": (encode(6), "jpg"),
}


@pytest.mark.parametrize("encoding", [Encoding(), Encoding(resize_short=12, format="jpg")], ids=["keep", "anew"])
def test_odd_images_are_kept_and_broken_ones_listed_with_reasons(tmp_path, encoding):
    (tmp_path / "images/things").mkdir(parents=True)
    for name, (data, _) in {**BROKEN, **ODD}.items():
        (tmp_path / "images/things" / name).write_bytes(data)
    made = build(tmp_path / "images", tmp_path / "out", workers=1, max_rejected=len(BROKEN), encoding=encoding)
    rejected = dict(made.parts["all"].rejected)
    assert sorted(rejected) == sorted(f"things/{name}" for name in BROKEN)
    for name, (_, reason) in BROKEN.items():
        assert reason in rejected[f"things/{name}"]
    dataset = Dataset.open(tmp_path / "out")
    samples = {sample.key: sample for sample in map(dataset.__getitem__, range(len(dataset)))}
    assert len(samples) == len(ODD)
    for name, (data, format) in ODD.items():
        sample = samples["things/" + name.rpartition(".")[0].replace(".", "_")]
        image = decode(sample.image, sample.key)
        if encoding == Encoding():
            assert (sample.image, sample.format) == (data, format)
        else:
            assert sample.format == "jpg"
            assert min(image.shape[:2]) == 12


def test_dead_urls_of_a_table_are_listed_with_reasons(source, tmp_path):
    image = next(source.rglob("*.jpg")).relative_to(source)
    with serve(source) as web, answering() as odd:
        dead = {f"{odd}/410": "410 Gone", f"{odd}/403": "403 Forbidden", f"{web}/none.jpg": "missing"}
        rows = [f"{web}/{image}", *dead]
        (tmp_path / "table.csv").write_text("url,label\n" + "".join(f"{url},a\n" for url in rows))
        made = build(tmp_path / "table.csv", tmp_path / "out", workers=1, max_rejected=3)
        assert dict(made.parts["all"].rejected) == dead
        assert made.parts["all"].samples == 1
        with pytest.raises(UserError, match=r"3 broken images .*\(410 Gone\)"):
            build(tmp_path / "table.csv", tmp_path / "out2", workers=1, max_rejected=2)


def test_a_url_that_was_dead_is_asked_again_where_its_loss_stopped_the_build(source, tmp_path):
    image, other = sorted(source.rglob("*.jpg"))[:2]
    (tmp_path / "web").mkdir()
    shutil.copy(image, tmp_path / "web/a.jpg")
    with serve(tmp_path / "web") as web:
        (tmp_path / "table.csv").write_text(f"url,label\n{web}/a.jpg,x\n{web}/b.jpg,x\n")
        with pytest.raises(UserError, match="1 broken image"):
            build(tmp_path / "table.csv", tmp_path / "out", workers=1)
        with pytest.raises(UserError, match="1 broken image"):  # nothing was mended
            build(tmp_path / "table.csv", tmp_path / "out", workers=1)
        shutil.copy(other, tmp_path / "web/b.jpg")
        made = build(tmp_path / "table.csv", tmp_path / "out", workers=1)
    assert (made.parts["all"].samples, made.parts["all"].rejected) == (2, [])


def test_a_finished_data_set_stays_where_fewer_rejected_are_allowed_now(source, tmp_path):
    with serve(source) as web:
        (tmp_path / "table.csv").write_text(
            f"url,label\n{web}/{next(source.rglob('*.jpg')).relative_to(source)},x\n{web}/none.jpg,x\n"
        )
        build(tmp_path / "table.csv", tmp_path / "out", workers=1, max_rejected=1)
        before = tree(tmp_path / "out")
        with pytest.raises(UserError, match="1 broken image"):
            build(tmp_path / "table.csv", tmp_path / "out", workers=1)
    assert before.items() <= tree(tmp_path / "out").items()


def test_orientation_is_honoured_and_recorded(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/turned.jpg").write_bytes(saved(NOISE, "JPEG", exif=exif))

    def row(name, **settings):
        build(tmp_path / "images", tmp_path / name, workers=1, **settings)
        return manifest.read_table(open_store(tmp_path / name).read(manifest.samples_path(0))).to_pylist()[0]

    kept = row("kept")
    assert (kept["width"], kept["height"], kept["orientation"]) == (40, 30, 6)
    anew = row("anew", encoding=Encoding(quality=95))
    assert (anew["width"], anew["height"], anew["orientation"]) == (30, 40, 6)
    images = [decode(Dataset.open(tmp_path / name)[0].image, "key").shape for name in ("kept", "anew")]
    assert images == [(40, 30, 3)] * 2


def test_images_too_large_for_the_format_are_rejected(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/long.png").write_bytes(saved(Image.new("RGB", (70_000, 2)), "PNG"))
    (tmp_path / "images/a/fine.png").write_bytes(encode(1, "PNG"))
    for format, limit in [("jpg", 65_500), ("webp", 16_383)]:
        made = build(
            tmp_path / "images", tmp_path / format, workers=1, max_rejected=1, encoding=Encoding(format=format)
        )  # fmt: skip
        assert made.parts["all"].samples == 1
        reason = f"70000 x 2 pixels are too many for {format}, which ends at {limit} a side"
        assert made.parts["all"].rejected == [("a/long.png", reason)]


def test_a_source_is_never_written_to(tmp_path):
    raw = make_source(tmp_path / "raw/train", classes=2, each=3)
    before = tree(tmp_path / "raw")
    for source, out in [
        (raw, tmp_path / "raw"),
        (raw, raw / "out"),
        (raw, (raw / "out").as_uri()),
        (raw.as_uri(), raw),
    ]:
        with pytest.raises(UserError, match="lies in the source"):
            build(source, out, split={"val": 0.4}, workers=1)
        assert tree(tmp_path / "raw") == before
    build(raw, tmp_path / "set", workers=1)
    before = tree(tmp_path / "set")
    for source in (tmp_path / "set/shards", tmp_path / "set/shards/000000.tar"):
        with pytest.raises(UserError, match="would be written over the source"):
            build(source, tmp_path / "set", kind="tars", shard_samples=2, workers=1)
        assert tree(tmp_path / "set") == before


def test_a_refused_build_leaves_nothing_behind_and_does_not_list_the_source(source, tmp_path):
    build(source, tmp_path / "set", workers=1)
    before = tree(tmp_path / "set")
    with pytest.raises(UserError, match=r"already holds another data set \(shard_samples differ\)"):
        build(tmp_path / "not there at all", tmp_path / "set", shard_samples=2, workers=1)
    with pytest.raises(UserError, match=r"images, classes differ"):
        build(make_source(tmp_path / "other", classes=3, each=2), tmp_path / "set", workers=1)
    assert tree(tmp_path / "set") == before
    assert not (tmp_path / "set/.build").exists()


def test_where_there_is_no_room_to_work_in_the_reason_is_told(source, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/.build").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PatchmillError, match=r"cannot write to .*set/\.build/slice-0-of-1: File exists"):
        build(source, tmp_path / "set", workers=1)


def test_parts_of_an_earlier_try_are_cleared(source, tmp_path):
    images = make_source(tmp_path / "images", classes=2, each=8)
    (images / "class.0/broken.jpg").touch()
    with pytest.raises(UserError, match="1 broken image"):
        build(images, tmp_path / "out", shard_samples=2, workers=1)
    assert list((tmp_path / "out/shards").iterdir())
    build(images, tmp_path / "out", shard_samples=2, split={"val": 0.4}, max_rejected=1, workers=1)
    build(images, tmp_path / "fresh", shard_samples=2, split={"val": 0.4}, max_rejected=1, workers=1)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_captions_are_class_names(source, tmp_path):
    import webdataset as wds

    build(source, tmp_path / "out", workers=1, captions=True)
    samples = list(wds.WebDataset(str(tmp_path / "out/shards/000000.tar"), shardshuffle=False))
    assert len(samples) == 16
    for sample in samples:
        assert sample["txt"].decode() == f"class.{sample['cls'].decode()}"


def test_full_disk_leaves_nothing_half_written(source, tmp_path):
    program = """
import resource, sys
from shards.build import build
from shards.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
try:
    build(sys.argv[1], sys.argv[2], shard_samples=6, workers=int(sys.argv[3]))
except UserError as error:
    sys.exit(str(error))
"""
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        done = subprocess.run(  # whose own file could not be written either, were it to measure coverage
            [sys.executable, "-c", program, str(source), str(out), workers],
            capture_output=True, text=True, timeout=60, check=False, env=unmeasured,
      )  # fmt: skip
        assert "cannot write" in done.stderr
        assert "File too large" in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(out.rglob(manifest.DATASET))
        assert not list(out.rglob("*.partial"))
        for tar in out.rglob("*.tar"):
            assert tar.stat().st_size % 10240 == 0
        build(source, out, shard_samples=6, workers=1)
        build(source, tmp_path / "fresh", shard_samples=6, workers=1)
        assert tree(out) == tree(tmp_path / "fresh")


def test_small_disk(source, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        with pytest.raises(UserError, match=r"cannot write .*No space left on device; mend that and run"):
            build(source, disk / "out", shard_samples=4, workers=1)
        assert not list(disk.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        build(source, disk / "out", shard_samples=4, workers=1)
        build(source, tmp_path / "fresh", shard_samples=4, workers=1)
        assert tree(disk / "out") == tree(tmp_path / "fresh")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_dry_run_writes_nothing(source, tmp_path):
    planned = build(source, tmp_path / "out", shard_samples=5, split={"val": 0.3}, dry_run=True)
    assert not (tmp_path / "out").exists()
    made = build(source, tmp_path / "out", shard_samples=5, split={"val": 0.3}, workers=1)
    for name, part in planned.parts.items():
        assert (part.samples, part.shards) == (made.parts[name].samples, made.parts[name].shards)


@pytest.mark.parametrize("kind", ["parquet", "cifar archive", "cifar folder"])
def test_dry_run_copies_no_images(tmp_path, monkeypatch, kind):
    if kind == "parquet":
        source = write_parquet(tmp_path / "set/train-00000-of-00001.parquet", [0, 1, 2, -1, 1]).parent
    elif kind == "cifar archive":
        source = archive(tmp_path / "cifar-10-python.tar.gz", "cifar-10-python")
    else:
        name, content = files("cifar-10-binary")
        source = tmp_path / name
        source.mkdir()
        for name, data in content.items():
            (source / name).write_bytes(data)
    opened = []
    monkeypatch.setattr("shards.sources.unpack.open", lambda *given, **_: opened.append(given), raising=False)
    planned = build(source, tmp_path / "out", shard_samples=3, dry_run=True)
    assert not opened
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    made = build(source, tmp_path / "out", shard_samples=3, workers=1)
    assert planned.others == made.others
    assert planned.classes == made.classes
    assert {name: (part.samples, part.shards, part.bytes) for name, part in planned.parts.items()} == {
        name: (part.samples, part.shards, 0) for name, part in made.parts.items()
    }


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        (Encoding(resize_short=0), "--resize-short 0"),
        (Encoding(quality=101), "--quality 101"),
        (Encoding(format="gif"), "--format gif: the formats are jpg, png, webp"),
    ],
)
def test_bad_encodings(source, tmp_path, encoding, message):
    with pytest.raises(UserError, match=message):
        build(source, tmp_path / "out", encoding=encoding)
    assert not (tmp_path / "out").exists()
