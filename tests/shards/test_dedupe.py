"""``shards dedupe`` on real data sets: what it finds and writes, stopped on the way, and asked wrongly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards import dedupe as dedupe_module
from shards import manifest
from shards.atomic import only_one
from shards.build import build
from shards.dataset import Dataset
from shards.dedupe import dedupe
from shards.droplist import write_exclude
from shards.errors import UserError
from shards.plan import Slice
from shards.verify import verify
from tests.shards.images import tree
from tests.shards.photographs import jpeg, photographs
from tests.shards.servers import serve_faults

ROOT = Path(__file__).parents[2]
COPIES = {"bytes": ("exact", False), "quality": ("near", False), "half": ("near", False), "mirror": ("near", True),
          "cut": ("near", False), "dark": ("near", False)}  # fmt: skip


def write(folder: Path, images: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / f"{name}.jpg").write_bytes(data)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A training set with one copy of each kind, and two test sets; each has a blank image and one that is broken."""
    folder = tmp_path_factory.mktemp("sets")
    tests, others = photographs(10), photographs(40, seed=1)
    blank = np.full((160, 160, 3), 200, np.uint8)
    write(folder / "source/val/a", {f"t{i}": jpeg(image, 95) for i, image in enumerate(tests[:6])})
    write(folder / "source/val/b", {"blank": jpeg(blank, 95), "broken": jpeg(tests[9], 95)})
    write(folder / "source/other/a", {f"u{i}": jpeg(image, 95) for i, image in enumerate([tests[0], *tests[6:9]])})
    write(folder / "source/train/own", {f"o{i}": jpeg(image, 90) for i, image in enumerate(others)})
    half = Image.fromarray(tests[2]).resize((80, 80), Image.LANCZOS)
    write(folder / "source/train/taken", {
        "bytes": jpeg(tests[0], 95), "quality": jpeg(tests[1], 35), "half": jpeg(np.asarray(half), 85),
        "mirror": jpeg(tests[3][:, ::-1], 85), "cut": jpeg(tests[4][4:, 5:], 90),
        "dark": jpeg((tests[5] * 0.7).astype(np.uint8), 85), "blank": jpeg(blank, 60), "broken": jpeg(others[0], 80),
    })  # fmt: skip
    for name in ("train", "val", "other"):
        build(folder / "source" / name, folder / name, shard_samples=8, workers=1)
    for name, key in (("train", "taken/broken"), ("val", "b/broken")):
        overwrite(folder / name, key)
    return folder


def overwrite(url: Path, key: str) -> None:
    """Spoil the bytes of an image inside its tar."""
    dataset = Dataset.open(url)
    for shard in range(len(dataset.shard_sizes)):
        rows = dataset.rows(shard)
        if key in rows.key:
            index = rows.key.index(key)
            with open(url / manifest.shard_path(shard), "rb+") as file:
                file.seek(rows.offset[index])
                file.write(b"spoilt" * (int(rows.size[index]) // 6))


@pytest.fixture
def train(sets, tmp_path) -> Path:
    """A training set of this test alone: links to the shards, an own manifest."""
    folder = tmp_path / "train"
    for name, data in tree(sets / "train/manifest").items():
        path = folder / "manifest" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "shards").symlink_to(sets / "train/shards")
    return folder


def against(sets: Path) -> list[Path]:
    return [sets / "val", sets / "other"]


def keys(dataset: Dataset) -> set[str]:
    return {key for shard in range(len(dataset.shard_sizes)) for key in dataset.rows(shard).key}


def outcome(out: Path, train: Path) -> dict[str, bytes]:
    files = [out / "pairs.parquet", out / "report.html", *sorted((train / manifest.EXCLUDE).glob("*"))]
    return {path.name: path.read_bytes() for path in files}


def test_every_kind_of_copy_is_found_and_dropped(sets, train, tmp_path):
    before = tree(train / "manifest")
    found = dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    assert found.finished
    pairs = pq.read_table(found.pairs).to_pylist()
    of_val = {pair["key"]: (pair["kind"], pair["mirrored"]) for pair in pairs if pair["test"].endswith("/val")}
    assert of_val == {f"taken/{name}": how for name, how in COPIES.items()}
    assert [(pair["key"], pair["test_key"], pair["kind"]) for pair in pairs if pair["test"].endswith("/other")] == [
        ("taken/bytes", "a/u0", "exact")
    ]
    for pair in pairs:  # places are raw ones, on both sides
        assert Dataset.open(train).rows(pair["shard"]).key[pair["index"]] == pair["key"]
        test = sets / pair["test"].rpartition("/")[2]
        assert Dataset.open(test).rows(pair["test_shard"]).key[pair["test_index"]] == pair["test_key"]
    kept = Dataset.open(train, exclude="dedupe-1")
    assert keys(Dataset.open(train)) - keys(kept) == set(of_val)
    val, other = found.tests
    assert (val.images, val.exact, val.near, val.mirrored, val.hit) == (8, 1, 5, 1, 6)
    assert (other.images, other.exact, other.near, other.hit) == (4, 1, 0, 1)
    assert (found.images, found.copies, found.dropped) == (48, 6, 6)
    after = tree(train / "manifest")
    assert {name: after[name] for name in before} == before


def test_blank_and_broken_images_are_counted_and_never_near(sets, train, tmp_path):
    found = dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    assert (found.blank, found.undecodable) == (1, [("taken/broken", "no known image format")])
    val, other = found.tests
    assert (val.blank, [key for key, _ in val.undecodable]) == (1, ["b/broken"])
    assert (other.blank, other.undecodable) == (0, [])


def test_what_cannot_be_compared_is_still_found_by_its_bytes(sets, train, tmp_path):
    found = dedupe(sets / "val", [train], out=tmp_path / "out", workers=1, dry_run=True)
    assert found.copies == 6  # a copy seen from the other side is one too
    write(tmp_path / "source/x", {"blank": jpeg(np.full((160, 160, 3), 200, np.uint8), 95), "o": b""})
    (tmp_path / "source/x/o.jpg").unlink()
    build(tmp_path / "source", tmp_path / "blanks", workers=1)
    found = dedupe(tmp_path / "blanks", [sets / "val"], out=tmp_path / "out2", workers=1)
    assert (found.copies, found.tests[0].exact) == (1, 1)


def test_slices_and_workers_change_nothing(sets, tmp_path, train):
    whole = dedupe(train, against(sets), out=tmp_path / "whole", workers=1)
    expected = outcome(tmp_path / "whole", train)
    (train / manifest.exclude_path("dedupe-1")).unlink()
    first = dedupe(train, against(sets), out=tmp_path / "cut", workers=2, own=Slice(1, 2))
    assert not first.finished
    assert first.shards_left == 3
    assert first.exclude is first.report is first.pairs is None
    assert not (train / manifest.EXCLUDE).exists() or not list((train / manifest.EXCLUDE).iterdir())
    last = dedupe(train, against(sets), out=tmp_path / "cut", workers=1, own=Slice(0, 2))
    assert last.finished
    assert outcome(tmp_path / "cut", train) == expected
    assert (last.images, last.copies, last.tests) == (whole.images, whole.copies, whole.tests)


def test_asked_again_it_reads_no_image_and_changes_nothing(sets, train, tmp_path):
    dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    expected = outcome(tmp_path / "out", train)
    findings = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/findings").iterdir()}
    dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    assert outcome(tmp_path / "out", train) == expected
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out/findings").iterdir()} == findings


def test_a_killed_run_goes_on_where_it_was(sets, train, tmp_path):
    expected_train = tmp_path / "expected"
    expected_train.mkdir()
    for name in ("manifest", "shards"):
        (expected_train / name).symlink_to(sets / "train" / name)
    dedupe(expected_train, against(sets), out=tmp_path / "expected-out", workers=1, dry_run=True)
    command = [sys.executable, "-m", "launch.cli", "shards", "dedupe", str(train), "--out", "out", "--workers", "1"]
    command += [part for test in against(sets) for part in ("--against", str(test))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out/findings/000000.parquet").exists():
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait(10)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/findings").glob("*.parquet")}
    assert there
    found = dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert found.copies == 6
    assert (tmp_path / "out/pairs.parquet").read_bytes() == (tmp_path / "expected-out/pairs.parquet").read_bytes()


def test_an_older_drop_list_is_taken_in(sets, train, tmp_path):
    dataset = Dataset.open(train)
    taken = next((s, dataset.rows(s).key.index("taken/half")) for s in range(6) if "taken/half" in dataset.rows(s).key)
    blurred = next((s, i) for s in range(6) for i, key in enumerate(dataset.rows(s).key) if key == "own/o3")
    write_exclude(train, "v1", [(*taken, "upside down"), (*blurred, "blurred")])
    found = dedupe(train, against(sets), version="v2", base="v1", out=tmp_path / "out", workers=1)
    assert (found.images, found.copies, found.dropped) == (len(dataset) - 2, 5, 7)
    rows = pq.read_table(train / manifest.exclude_path("v2")).to_pylist()
    reasons = {(row["shard"], row["index"]): row["reason"] for row in rows}
    assert (reasons[taken], reasons[blurred]) == ("upside down", "blurred")
    assert sum("copy (near, mirrored) of a/t3 in " in reason for reason in reasons.values()) == 1
    with pytest.raises(UserError, match="no drop list 'v0'"):
        dedupe(train, against(sets), version="v3", base="v0", out=tmp_path / "out3")


def test_what_was_quarantined_is_not_read(sets, train, tmp_path):
    train = shutil.copytree(train, tmp_path / "copy")
    tar = train / manifest.shard_path(2)
    lost = {row["key"] for row in pq.read_table(train / manifest.samples_path(2)).to_pylist()}
    tar.write_bytes(tar.read_bytes()[:1000])
    damaged = verify(train, quarantine="bad")
    assert damaged.quarantine == "bad"
    with pytest.raises(UserError, match="ends before"):
        dedupe(train, against(sets), version="v1", out=tmp_path / "raw", workers=1)
    found = dedupe(train, against(sets), version="v2", base="bad", out=tmp_path / "out", workers=1)
    assert found.images == len(Dataset.open(train)) - damaged.faulty
    whole = pq.read_table(tmp_path / "out/pairs.parquet").to_pylist()
    for pair in whole:  # places are raw ones, as in any drop list
        assert pq.read_table(train / manifest.samples_path(pair["shard"]))["key"][pair["index"]].as_py() == pair["key"]
    assert {pair["key"] for pair in whole} & lost == set()
    assert whole


def test_a_dry_run_writes_the_report_and_no_drop_list(sets, train, tmp_path):
    before = tree(train / "manifest")
    found = dedupe(train, against(sets), out=tmp_path / "out", workers=1, dry_run=True)
    assert found.exclude is None
    assert tree(train / "manifest") == before
    page = (tmp_path / "out/report.html").read_text()
    assert "none: a dry run" in page


def test_the_report_stands_alone_and_shows_the_pairs(sets, train, tmp_path):
    found = dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    page = Path(found.report).read_text()
    assert page.count('src="data:image/jpeg;base64,') == page.count("<img") == 14
    assert "http" not in page
    for text in ("6 of 48 training images", "taken/mirror", "same bytes", "dedupe-1, 6 samples", "taken/broken"):
        assert text in page


def test_a_training_set_in_a_bucket(sets, train, tmp_path, s3):
    import obstore

    store = obstore.store.from_url(s3)
    for name in ("manifest", "shards"):
        for path, data in tree(sets / "train" / name).items():
            obstore.put(store, f"set/{name}/{path}", data)
    found = dedupe(f"{s3}/set", against(sets), out=tmp_path / "out", workers=1)
    assert found.copies == 6
    local = dedupe(train, against(sets), out=tmp_path / "local", workers=1)
    assert (tmp_path / "out/pairs.parquet").read_bytes() == Path(local.pairs).read_bytes()
    assert len(Dataset.open(f"{s3}/set", exclude="dedupe-1")) == 42
    again = dedupe(f"{s3}/set", against(sets), out=tmp_path / "out", workers=1)
    assert again.exclude == "dedupe-1"
    with pytest.raises(UserError, match="exists and never changes"):
        dedupe(f"{s3}/set", against(sets), out=tmp_path / "new", workers=1)


@pytest.mark.parametrize(("version", "message"), [("../x", "letters, digits"), ("v1", "choose another --version")])
def test_bad_names_are_refused_before_anything_is_read(sets, train, tmp_path, version, message):
    write_exclude(train, "v1", [(0, 0, "x")])
    with pytest.raises(UserError, match=message):
        dedupe(train, against(sets), version=version, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(sets, train, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("dear to me")
    with pytest.raises(UserError, match="holds something else"):
        dedupe(train, against(sets), out=tmp_path / "full")
    dedupe(train, [sets / "val"], out=tmp_path / "out", workers=1)
    with pytest.raises(UserError, match=r"another dedupe \(tests differ\)"):
        dedupe(train, [sets / "other"], version="v2", out=tmp_path / "out")


def test_a_test_set_that_moved_between_slices_is_the_same_one(sets, train, tmp_path):
    expected = dedupe(train, against(sets), out=tmp_path / "whole", workers=1, dry_run=True)
    dedupe(train, against(sets), out=tmp_path / "out", workers=1, own=Slice(0, 2), dry_run=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/holdout").symlink_to(sets / "val")
    moved = [tmp_path / "elsewhere/holdout", sets / "other"]
    found = dedupe(train, moved, out=tmp_path / "out", workers=1, own=Slice(1, 2))
    assert found.finished
    counts = [(test.exact, test.near, test.mirrored, test.hit) for test in found.tests]
    assert counts == [(test.exact, test.near, test.mirrored, test.hit) for test in expected.tests] == [
        (1, 5, 1, 6), (1, 0, 0, 1),
    ]  # fmt: skip
    assert found.tests[0].name == "elsewhere/holdout"
    named = pq.read_table(found.pairs)
    assert set(named["test"].to_pylist()) == {test.name for test in found.tests}
    assert named.drop_columns(["test"]).equals(pq.read_table(expected.pairs).drop_columns(["test"]))
    again = dedupe(train, against(sets), out=tmp_path / "out", workers=1)  # the same samples, under another name
    assert (again.exclude, again.dropped) == ("dedupe-1", 6)


def test_slices_may_start_together(sets, train, tmp_path):
    raw, tests = Dataset.open(train), [Dataset.open(each) for each in against(sets)]
    for number in range(4):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _, out=tmp_path / str(number): dedupe_module._claim(out, raw, tests), range(4)))
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / ".plan.json.partial").write_text("{")
    dedupe_module._claim(killed, raw, tests)
    assert json.loads((killed / "plan.json").read_text())["train"] == raw.digest


def test_a_slice_runs_once_at_a_time_and_says_what_it_waits_for(sets, train, tmp_path, capfd):
    out = tmp_path / "out"
    dedupe(train, against(sets), out=out, workers=1, own=Slice(1, 2))
    assert "waiting" not in capfd.readouterr().err
    with only_one(out / "slices/0-of-2", "test"), pytest.raises(UserError, match="another dedupe of slice 0/2"):
        dedupe(train, against(sets), out=out, workers=1, own=Slice(0, 2))
    held = ExitStack()
    held.enter_context(only_one(out / "tests", "test"))
    with ThreadPoolExecutor(1) as pool, redirect_stderr(StringIO()) as said:
        running = pool.submit(dedupe, train, against(sets), out=out, workers=1, own=Slice(0, 2))
        deadline = time.monotonic() + 30
        while "waiting for another dedupe that reads the same test images" not in said.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not running.done()
        held.close()
        assert running.result(60).finished


def test_test_shards_are_hashed_in_parts_with_the_same_result(sets, train, tmp_path, monkeypatch):
    dedupe(train, against(sets), out=tmp_path / "whole", workers=1, dry_run=True)
    monkeypatch.setattr(dedupe_module, "PART_IMAGES", 3)
    hashed = []
    real = dedupe_module._hash_part
    monkeypatch.setattr(dedupe_module, "_hash_part", lambda part: (hashed.append(part), real(part))[1])
    dedupe(train, against(sets), out=tmp_path / "parts", workers=1, dry_run=True)
    assert [(part.test, part.start, part.stop) for part in hashed] == [
        (0, 0, 3), (0, 3, 6), (0, 6, 8), (1, 0, 3), (1, 3, 4),
    ]  # fmt: skip
    for name in ("index", "findings"):
        assert tree(tmp_path / "parts" / name) == tree(tmp_path / "whole" / name)


def test_rows_of_one_shard_alone_stay_in_memory(train):
    dedupe_module._open.cache_clear()
    dataset = dedupe_module._open(str(train))
    rows = [weakref.ref(dataset.rows(shard)) for shard in range(6)]
    assert [each() is not None for each in rows] == [False] * 5 + [True]


@pytest.mark.parametrize("limit", [20_000, 250_000])  # while hashing test images; while writing the index
def test_a_full_disk_is_told_and_the_next_run_goes_on(sets, train, tmp_path, limit):
    program = (
        "import resource, sys; from shards.dedupe import dedupe; from shards.errors import UserError\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try: dedupe(sys.argv[1], sys.argv[2:4], out=sys.argv[4], workers=1)\n"
        "except UserError as error: print(error)"
    )
    command = [sys.executable, "-c", program, str(train), *map(str, against(sets)), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.startswith("cannot write "), done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert not (tmp_path / "out/index").exists()
    assert dedupe(train, against(sets), out=tmp_path / "out", workers=1).copies == 6


def test_a_drop_list_that_cannot_be_written(sets, train, tmp_path):
    (train / manifest.EXCLUDE).write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*exclude/dedupe-1\.parquet"):
        dedupe(train, against(sets), out=tmp_path / "out", workers=1)
    assert not (tmp_path / "out/report.html").exists()  # which would tell of the list
    (train / manifest.EXCLUDE).unlink()
    assert dedupe(train, against(sets), out=tmp_path / "out", workers=1).dropped == 6
    with serve_faults(train) as server:
        url = server.url
        with pytest.raises(UserError, match="takes no drop list: a web server"):
            dedupe(url, against(sets), out=tmp_path / "web", workers=1)
        assert not (tmp_path / "web").exists()
        assert dedupe(url, against(sets), out=tmp_path / "web", workers=1, dry_run=True).copies == 6


@pytest.mark.parametrize("out", ["s3://bucket/out", "file:///tmp/out", Path("s3://bucket/out")])
def test_results_go_to_a_local_folder(sets, train, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--out (s3|file):/+(bucket|tmp)/out: must be a local path"):
        dedupe(train, against(sets), out=out)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_damaged_findings_are_told(sets, train, tmp_path):
    dedupe(train, against(sets), out=tmp_path / "out", workers=1, dry_run=True)
    (tmp_path / "out/findings/000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"findings/000001\.parquet is damaged .*remove it and run the same command"):
        dedupe(train, against(sets), out=tmp_path / "out", workers=1, dry_run=True)
    (tmp_path / "out/findings/000001.parquet").unlink()
    assert dedupe(train, against(sets), out=tmp_path / "out", workers=1, dry_run=True).copies == 6


def refused(*arguments: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", "shards", "dedupe", *map(str, arguments)], cwd=cwd, capture_output=True,
        text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_mistakes_on_the_command_line(sets, train, tmp_path):
    assert "--against URL" in refused(train, cwd=tmp_path)
    assert "no folder" in refused("nowhere", "--against", sets / "val", cwd=tmp_path)
    assert "no folder nowhere" in refused(train, "--against", "nowhere", cwd=tmp_path)
    assert "the training set itself" in refused(train, "--against", sets / "train", cwd=tmp_path)
    twice = refused(train, "--against", sets / "val", "--against", sets / "val", cwd=tmp_path)
    assert "name each data set once" in twice
    assert "write I/N" in refused(train, "--against", sets / "val", "--slice", "2/2", cwd=tmp_path)
    assert "--workers 0" in refused(train, "--against", sets / "val", "--workers", "0", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_the_command_line_says_what_it_found(sets, train, tmp_path):
    command = [sys.executable, "-m", "launch.cli", "shards", "dedupe", str(train), "--against", str(sets / "val")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--workers", "1", "--json"], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=60, check=True)  # fmt: skip
    said = json.loads(done.stdout)
    assert (said["copies"], said["exclude"], said["report"]) == (6, "dedupe-1", "dedupe-1/report.html")
    assert (tmp_path / "dedupe-1/report.html").is_file()
