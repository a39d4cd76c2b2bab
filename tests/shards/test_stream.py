"""Tars without a manifest, commands and standard input through StreamLoader."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from shards.augment import InceptionCrop, Resize
from shards.build import build
from shards.dataset import Dataset
from shards.decode import decode
from shards.errors import PatchmillError, UserError
from shards.loader import Loader
from shards.stream import StreamLoader
from tests.shards.foreign import image, write_tar, write_webdataset
from tests.shards.images import make_source
from tests.shards.sources.servers import serve

ROOT = Path(__file__).parents[2]
CLASSES = ["a", "b", "c"]
PLAIN = Resize(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tars of ten, ten and four samples by stock webdataset; sample i is ``image(i)`` of class i % 3."""
    return write_webdataset(tmp_path_factory.mktemp("tars"))


def stream(source, **options):
    return StreamLoader(str(source), CLASSES, **{"global_batch": 8, "transform": PLAIN, "seed": 3} | options)


def pixels(i):
    return PLAIN(decode(image(i), ""), (0, 0, 0)).tobytes()


def found(batches):
    """The numbers of the samples in batches, by their pixels; their labels are checked."""
    batches, known = list(batches), {pixels(i): i for i in range(24)}
    numbers = [known[each.tobytes()] for batch in batches for each in batch.images]
    assert [n % 3 for n in numbers] == [int(label) for batch in batches for label in batch.labels]
    return numbers


SOURCES = ["{}/set-{{000000..000002}}.tar", "{}/*.tar", "pipe:cat {}/set-{{000000..000002}}.tar"]


@pytest.mark.parametrize("source", SOURCES)
def test_every_sample_comes_once_a_turn_shuffled(folder, source):
    mine = stream(source.format(folder), allow_pipe=True)
    batches = list(islice(mine, 6))
    assert batches[0].images.shape == (8, 8, 8, 3)
    assert batches[0].images.dtype == np.uint8
    assert batches[0].labels.dtype == batches[0].positions.dtype == np.int64
    assert [p for batch in batches for p in batch.positions] == list(range(48))
    numbers = found(batches)
    assert len(set(numbers)) == 24
    assert numbers[:24] != sorted(numbers[:24])
    assert mine.samples == 48
    again = list(islice(stream(source.format(folder), allow_pipe=True, threads=4, prefetch=0), 6))
    assert found(again) == numbers
    other = list(islice(stream(source.format(folder), allow_pipe=True, seed=4), 6))
    assert found(other) != numbers
    assert mine.counts().bytes >= 2 * sum(len(image(i)) for i in range(24))
    assert mine.counts().decode_seconds > 0
    assert mine.counts().read_seconds > 0


def test_without_a_buffer_tars_come_in_another_order_each_turn(folder):
    numbers = found(islice(stream(f"{folder}/*.tar", buffer=1), 30))
    turns = [numbers[i : i + 24] for i in range(0, 240, 24)]
    assert all(sorted(turn) == list(range(24)) for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 2


def test_augmentation_is_keyed_by_the_number_of_the_sample(folder):
    def key_of(image, key):
        return np.full((8, 8, 3), key[2], np.uint8)

    key_of.size = 8
    for rank in range(2):
        mine = stream(f"{folder}/*.tar", transform=key_of, rank=rank, world_size=2)
        keys = [int(each[0, 0, 0]) for batch in islice(mine, 3) for each in batch.images]
        assert keys == list(range(rank, 24, 2))


def test_over_http(folder):
    with serve(folder) as url:
        assert len(set(found(islice(stream(f"{url}/set-{{000000..000002}}.tar"), 3)))) >= 20


def test_ranks_read_tars_of_their_own(folder):
    ranks = [stream(f"{folder}/*.tar", rank=rank, world_size=2, buffer=1) for rank in range(2)]
    batches = [list(islice(mine, 30)) for mine in ranks]
    assert sorted(int(p) for part in batches for batch in part for p in batch.positions) == list(range(240))
    first = [set(found(part[:1])) for part in batches]
    assert not first[0] & first[1]
    assert set(found(batches[0])) == set(range(24)), "a rank does not see the same tars for ever"
    with pytest.raises(UserError, match=r"is 3 tar\(s\) for 4 ranks, and each reads tars of its own"):
        stream(f"{folder}/*.tar", world_size=4)
    with pytest.raises(UserError, match=r"is 1 tar\(s\) for 2 ranks"):
        stream("-", world_size=2)
    with pytest.raises(UserError, match="7 does not divide"):
        stream(f"{folder}/*.tar", global_batch=7, world_size=2)


def test_a_command_runs_only_if_allowed(folder, tmp_path):
    with pytest.raises(UserError, match=r"pipe:touch .*/ran would run a command; .* data.allow_pipe = true"):
        stream(f"pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match="a brace is not closed"):
        stream("pipe:cat {0..3", allow_pipe=True)


def test_a_command_that_fails_is_an_error_whatever_it_has_written(folder, tmp_path):
    tar = folder / "set-000000.tar"
    for command, words in [
        (f"cat {tar}; exit 3", "exit code 3"),
        (f"head -c 7000 {tar}; exit 4", "exit code 4"),
        ("cat missing.tar", "exit code 1"),
        ("no-such-program", "exit code 127"),
        (f"head -c 7000 {tar}", "unexpected end of data|does not end as tars do"),
        ("true", "empty file"),
    ]:
        with pytest.raises(PatchmillError, match=rf"cannot read pipe:{command.split()[0]}.*({words})"):
            list(islice(stream(f"pipe:{command}", allow_pipe=True), 9))


def test_commands_end_with_the_iterator(folder):
    mine = stream(f"pipe:cat {folder}/set-000000.tar; sleep 300 | cat", allow_pipe=True, prefetch=0, buffer=1)
    others = set(psutil.Process().children(recursive=True))  # of other tests, as Python's resource tracker
    batches = iter(mine)
    next(batches)
    deadline, children = time.monotonic() + 20, []
    while not {"sleep", "cat"} <= {child.name() for child in children}:
        assert time.monotonic() < deadline
        children = [child for child in psutil.Process().children(recursive=True) if child not in others]
    batches.close()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not [t for t in threading.enumerate() if t.name.startswith("decode")]


def damaged(folder, tmp_path, cut=None, put=None):
    data = bytearray((folder / "set-000000.tar").read_bytes())
    if put:
        data[put[0] : put[0] + len(put[1])] = put[1]
    (tmp_path / "x.tar").write_bytes(data[:cut])
    return tmp_path / "x.tar"


@pytest.mark.parametrize(
    "harm",
    [
        {"cut": 9 * 512},  # between two members: tarfile takes it for the end
        {"cut": 9 * 512 + 100},
        {"cut": 8 * 512 + 100},
        {"put": (9 * 512, b"\xff" * 512)},
        {"put": (6 * 512, b"\xff" * 512)},
    ],
)
def test_a_tar_that_is_cut_short_or_damaged_is_an_error_that_names_it(folder, tmp_path, harm):
    tar = damaged(folder, tmp_path, **harm)
    with pytest.raises(PatchmillError, match=rf"^cannot read {tar}: ") as error:
        list(islice(stream(tar), 9))
    assert "\n" not in str(error.value)
    assert "_Tape" not in str(error.value)
    assert "make it again" in str(error.value) or "make the tar again" in str(error.value)


def test_what_is_no_tar_and_several_in_one_are_told(folder, tmp_path):
    tars = sorted(folder.glob("*.tar"))
    (tmp_path / "two.tar").write_bytes(b"".join(tar.read_bytes() for tar in tars))
    with pytest.raises(UserError, match=r"two.tar: .* more follows, such as another tar"):
        list(islice(stream(tmp_path / "two.tar"), 9))
    with pytest.raises(UserError, match=r"compressed with gzip; unpack it"):
        next(iter(stream(f"pipe:gzip -c {tars[0]}", allow_pipe=True)))
    (tmp_path / "text.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(PatchmillError, match=r"cannot read .*text.tar: "):
        next(iter(stream(tmp_path / "text.tar")))
    with pytest.raises(UserError, match=r"no object .*gone.tar"):
        stream(tmp_path / "gone.tar")
    write_tar(tmp_path / "bare.tar", [("a.txt", b"a"), ("b.txt", b"b")])
    with pytest.raises(UserError, match=r"bare.tar holds no sample with an image and a label"):
        next(iter(stream(tmp_path / "bare.tar")))


def test_samples_that_cannot_be_used_are_left_out_counted_and_told(tmp_path, capsys):
    members = [(f"{i}.{e}", d) for i in range(24) for e, d in [("jpg", image(i)), ("cls", b"%d" % (i % 3))]]
    bad = [
        ("broken.jpg", b"\xff\xd8\xff" + bytes(500)), ("broken.cls", b"1"),
        ("bare.jpg", image(1)),
        ("word.jpg", image(1)), ("word.cls", b"zebra"),
        ("many.jpg", image(1)), ("many.json", b'{"labels": [0, 1]}'),
        ("twice.jpg", image(1)), ("twice.jpg", image(2)), ("twice.cls", b"1"),
        ("two.jpg", image(1)), ("two.png", image(2, "png")), ("two.cls", b"1"),
        ("text.txt", b"no image"), ("text.cls", b"1"),
    ]  # fmt: skip
    write_tar(tmp_path / "x.tar", members[:30] + bad + members[30:])
    mine = stream(tmp_path / "x.tar", quarantine=tmp_path / "q.jsonl", prefetch=0)
    batches = list(islice(mine, 6))
    assert [p for batch in batches for p in batch.positions] == list(range(48))
    assert set(found(batches)) == set(range(24))
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    reasons = {entry["key"]: entry["reason"] for entry in entries}
    assert set(reasons) == {"broken", "bare", "word", "many", "twice", "two", "text"}
    assert "cannot decode broken" in reasons["broken"]
    assert reasons["bare"] == "0 labels, one is needed"
    assert reasons["word"] == "there is no class 'zebra'"
    assert reasons["many"] == "2 labels, one is needed"
    assert "two files" in reasons["twice"]
    assert "several images" in reasons["two"]
    assert "no image" in reasons["text"]
    assert {entry["tar"] for entry in entries} == {f"{tmp_path}/x.tar"}
    assert mine.counts().quarantined == len(entries) >= 14
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3  # no manifest, and the first and tenth that were left out
    assert said[1].startswith("warning: 1 samples left out so far; the last is ")
    assert said[2].startswith("warning: 10 samples left out so far; the last is ")


def test_where_samples_are_noted_is_made_and_told_if_it_cannot_be(tmp_path):
    write_tar(tmp_path / "x.tar", [("0.jpg", b"none"), ("0.cls", b"1"), ("1.jpg", image(1)), ("1.cls", b"1")])
    next(iter(stream(tmp_path / "x.tar", quarantine=tmp_path / "new" / "q.jsonl")))
    assert json.loads((tmp_path / "new" / "q.jsonl").read_text().splitlines()[0])["key"] == "0"
    (tmp_path / "file").touch()
    with pytest.raises(PatchmillError, match=r"cannot write .*/file/q\.jsonl: .*; make room or mend the disk"):
        next(iter(stream(tmp_path / "x.tar", quarantine=tmp_path / "file" / "q.jsonl")))


def test_a_stream_of_nothing_usable_ends(tmp_path):
    for name, data in [("no.jpg", bytes(100)), ("yes.jpg", image(1))]:
        members = [(f"{i}{name}", data) for i in range(150)]
        if name == "no.jpg":
            members = [each for i, member in enumerate(members) for each in (member, (f"{i}no.cls", b"1"))]
        write_tar(tmp_path / "x.tar", members)
        with pytest.raises(PatchmillError, match="100 samples one after another cannot be used; the last is"):
            list(islice(stream(tmp_path / "x.tar"), 5))
    # One in two is much, but no reason to stop.
    members = [(f"{i}.jpg", image(i % 24)) for i in range(600)]
    members = [each for i, m in enumerate(members) for each in [m, *([(f"{i}.cls", b"%d" % (i % 3))] if i % 2 else [])]]
    write_tar(tmp_path / "x.tar", members)
    assert len(list(islice(stream(tmp_path / "x.tar", stop=200), 99))) == 25


def test_it_cannot_be_resumed_and_says_so(folder, capsys, tmp_path):
    mine = stream(f"{folder}/*.tar")
    assert "has no manifest: a run on it cannot be resumed" in capsys.readouterr().err
    list(islice(mine, 2))
    state = json.loads(json.dumps(mine.state_dict()))
    other = stream(f"{folder}/*.tar", rank=1, world_size=2)
    assert capsys.readouterr().err == ""
    other.load_state_dict(state)
    mine = stream(f"{folder}/*.tar")
    capsys.readouterr()
    mine.load_state_dict(state)
    assert "begins anew after 16 samples: some come again" in capsys.readouterr().err
    assert next(iter(mine)).positions.tolist() == list(range(16, 24))

    build(make_source(tmp_path / "source"), tmp_path / "set", workers=1)
    indexed = Loader(Dataset.open(tmp_path / "set"), global_batch=8, transform=InceptionCrop(8))
    with pytest.raises(UserError, match="the checkpoint is of a data set with a manifest"):
        mine.load_state_dict(indexed.state_dict())
    with pytest.raises(UserError, match="cannot resume the data stream"):
        indexed.load_state_dict(state)


def test_stop_ends_it(folder):
    mine = stream(f"{folder}/*.tar", stop=20)
    assert len(mine) == 3
    assert len(list(mine)) == 3
    assert list(mine) == []
    assert len(mine) == 0
    for source, options in [(f"{folder}/*.tar", {}), ("-", {"stop": 20})]:
        with pytest.raises(TypeError, match="nobody knows where"):
            len(stream(source, **options))


STDIN = """
import sys
from shards.augment import Resize
from shards.stream import StreamLoader
mine = StreamLoader("-", ["a", "b", "c"], global_batch=4, transform=Resize(8))
print([sorted(batch.labels.tolist()) for batch in mine], mine.samples)
"""


@pytest.mark.long
def test_standard_input_is_read_once(folder):
    def run(data):
        return subprocess.run(
            [sys.executable, "-c", STDIN], input=data, capture_output=True, timeout=120, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    done = run((folder / "set-000000.tar").read_bytes())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip().endswith(" 8")
    assert "the last 2 samples of - fill no batch and are left out" in done.stderr.decode()
    cut = run((folder / "set-000000.tar").read_bytes()[:9000])
    assert cut.returncode != 0
    assert "cannot read standard input: " in cut.stderr.decode()


def test_importing_does_not_import_torch():
    code = "import sys, shards.stream; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True, timeout=120)
    assert done.stdout.strip() == "False"


def test_reading_is_not_held_up_by_a_slow_command(folder):
    """The batch comes when its samples are there, not when the command ends."""
    began = time.monotonic()
    command = f"cat {folder}/set-000000.tar; sleep 20"
    mine = stream(f"pipe:{command}", allow_pipe=True, prefetch=0, buffer=1)
    for _ in mine:
        break
    assert time.monotonic() - began < 15
