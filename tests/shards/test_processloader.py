"""The loader in a process of its own gives what ``Loader`` gives; neither process outlives or hangs on the other."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil
import pytest

from shards.augment import InceptionCrop
from shards.cache import ChunkCache
from shards.dataset import Dataset
from shards.droplist import write_exclude
from shards.errors import PatchmillError, UserError
from shards.loader import Loader
from shards.mixture import Mixture
from shards.processloader import ProcessLoader
from shards.signals import SIGNALS
from shards.storesettings import StoreSettings
from tests.command import environment
from tests.shards.datasets import damage
from tests.shards.servers import serve_faults

BROKEN = [(0, 3), (2, 0), (4, 4)]
OPTIONS = {"global_batch": 12, "transform": InceptionCrop(8), "lanes": 4, "chunk": 4, "block": 8}


@dataclass(frozen=True)
class Failing:
    """A transform with a mistake."""

    size: int = 8

    def __call__(self, image, key):
        raise ValueError("my own mistake")


def digests(batches) -> list[str]:
    return [hashlib.sha256(b"".join(each.tobytes() for each in batch)).hexdigest() for batch in batches]


@pytest.fixture(scope="module")
def broken(ninety, tmp_path_factory):
    """A data set with a drop list and some samples that do not decode."""
    folder = tmp_path_factory.mktemp("broken") / "set"
    shutil.copytree(ninety, folder)
    write_exclude(folder, "v1", [(0, 1, "blurred"), (3, 2, "blurred")])
    damage(folder, BROKEN)
    return folder


@pytest.fixture
def running(ninety):
    with closing(ProcessLoader(Dataset.open(ninety), **OPTIONS)) as loader:
        yield loader


def test_batches_state_counts_and_quarantine_are_those_of_the_loader(broken, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what is relative means the same there
    with serve_faults(broken) as server:
        dataset = Dataset.open(server.url, "v1", settings=StoreSettings(retry_seconds=20))
        data = {
            "local": Dataset.open(os.path.relpath(broken), "v1"), "http": dataset,
            "mixture": Mixture([(dataset, 3), (Dataset.open(broken), 1)]),
        }  # fmt: skip
        for place, dataset in data.items():
            options = OPTIONS | ({"cache": ChunkCache("cache", 10**6)} if place == "http" else {})
            want = Loader(dataset, **options, quarantine=f"{place}.jsonl")
            expected = digests(islice(want, 12))
            server.fault, server.good, server.bad = "error", 5, 3
            first = ProcessLoader(dataset, **options, quarantine=f"{place}-process.jsonl")
            found = digests(islice(first, 5))
            state = json.loads(json.dumps(first.state_dict()))
            first.close()
            second = ProcessLoader(dataset, **options, quarantine=f"{place}-process.jsonl")
            second.load_state_dict(state)
            found += digests(islice(second, 7))
            assert found == expected, place
            assert second.state_dict() == want.state_dict()
            assert second.counts().bytes > 0
            assert second.replaced > 0
            lists = [Path(f"{name}.jsonl").read_text().splitlines() for name in (place, f"{place}-process")]
            assert sorted(lists[0]) == sorted(lists[1])
            assert len({(json.loads(line)["shard"], json.loads(line)["index"]) for line in lists[0]}) == len(BROKEN)
            second.close()


def test_place_batch_size_and_end_may_change_between_batches(ninety, running):
    def through(loader):
        found = []
        for step, batch in enumerate(loader):
            found.append((batch.positions.tolist(), digests([batch])))
            if step == 1:
                loader.global_batch, loader.stop = 6, 60
                assert len(loader) == 6
            if step == 3:
                loader.samples = 6
            if step == 5:
                state = loader.state_dict()
            if step == 7:
                loader.load_state_dict(state)
        return found, loader.samples

    assert through(running) == through(Loader(Dataset.open(ninety), **OPTIONS))
    with pytest.raises(UserError, match="0 "):
        running.global_batch = 0
    running.stop = None
    with pytest.raises(TypeError, match="no end"):
        len(running)


def test_batches_may_be_kept_as_long_as_one_likes_and_their_memory_serves_again(ninety, running):
    loader = Loader(Dataset.open(ninety), **OPTIONS)
    expected = digests(islice(loader, 60))
    found = iter(running)
    kept = list(islice(found, 20))
    first_rows = [next(found).images[0] for _ in range(5)]
    assert digests(kept) == expected[:20]
    memory = len(running._borrower._memory)
    assert memory >= 25
    del kept
    rest = digests(found for found in islice(found, 35))
    assert rest == expected[25:]
    assert len(running._borrower._memory) <= memory + 3  # which were made ahead before the others were let go
    again = Loader(Dataset.open(ninety), **OPTIONS)
    for row, batch in zip(first_rows, islice(again, 20, 25), strict=True):
        assert (row == batch.images[0]).all()
    found.close()
    running.close()
    assert first_rows[0].sum() == first_rows[0].copy().sum()  # memory is there as long as what is in it is wanted


def test_a_killed_process_is_one_clear_error(running):
    batches = iter(running)
    next(batches)
    os.kill(running._process.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(PatchmillError, match=r"^the decode process was killed by SIGKILL \(out of memory\?\); .*$"):
        next(batches)
    with pytest.raises(PatchmillError, match="was killed"):
        running.state_dict()
    assert time.monotonic() - began < 5


def test_a_closed_loader_says_so(running):
    process = psutil.Process(running._process.pid)
    running.close()
    assert not process.is_running()
    with pytest.raises(PatchmillError, match="has ended, since the loader was closed"):
        next(iter(running))


def test_errors_come_as_they_are(ninety, tmp_path):
    shutil.copytree(ninety, tmp_path / "set")
    (tmp_path / "set/shards/000003.tar").unlink()
    caught = []
    for kind in (Loader, ProcessLoader):
        with pytest.raises(UserError) as error:
            list(islice(kind(Dataset.open(tmp_path / "set"), **OPTIONS), 9))
        caught.append(error.value)
    assert (type(caught[0]), str(caught[0])) == (type(caught[1]), str(caught[1]))
    with pytest.raises(UserError, match="12 does not divide among 5 ranks"):
        ProcessLoader(Dataset.open(ninety), **OPTIONS, world_size=5)
    with pytest.raises(ValueError, match="my own mistake") as error:
        next(iter(ProcessLoader(Dataset.open(ninety), **OPTIONS | {"transform": Failing()})))
    assert "in __call__" in "".join(error.value.__notes__)  # where it was, in the other process
    with pytest.raises(UserError, match=r"cannot go into a process of its own: .*lambda.*top of a module"):
        ProcessLoader(Dataset.open(ninety), **OPTIONS | {"transform": lambda image, key: image})


PARENT = """
import signal, sys
from shards.augment import Resize
from shards.dataset import Dataset
from shards.processloader import ProcessLoader
from shards.signals import SIGNALS

if __name__ == "__main__":
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    loader = ProcessLoader(Dataset.open(sys.argv[1]), global_batch=8, transform=Resize(8))
    batches = iter(loader)
    for _ in sys.stdin:
        print(next(batches).positions[0], loader._process.pid, flush=True)
"""


@pytest.fixture
def parent(ninety, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", ninety], cwd=tmp_path, env=environment(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def another(parent) -> tuple[int, psutil.Process]:
    parent.stdin.write("\n")
    parent.stdin.flush()
    position, child = parent.stdout.readline().split()
    return int(position), psutil.Process(int(child))


def test_signals_are_for_the_parent_and_when_it_is_killed_the_process_ends(parent):
    _, child = another(parent)
    for number in SIGNALS:
        os.killpg(parent.pid, number)
    assert another(parent)[0] == 8
    parent.kill()
    assert psutil.wait_procs([child], timeout=20)[1] == [] or child.status() == psutil.STATUS_ZOMBIE
    assert parent.communicate(timeout=20)[1] == ""


def test_when_the_parent_ends_without_closing_it_the_process_ends_too(parent):
    _, child = another(parent)
    assert parent.communicate(timeout=20) == ("", "")
    assert parent.returncode == 0
    assert not child.is_running()
