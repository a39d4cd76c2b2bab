"""The cache of remote chunks: what it gives is right whatever happens to it, and it stays within its limit."""

import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from shards.cache import CHECKSUM, MARK, ChunkCache
from shards.errors import UserError

ROOT = Path(__file__).parents[2]
HOUR = 3600 * 10**9


def name_of(number: int) -> str:
    return f"{number:040x}"


def parts_of(number: int, size: int = 10_000) -> list[bytes]:
    data = random.Random(number).randbytes(size)
    return [data[: size // 3], data[size // 3 : size // 2], data[size // 2 :]]


def lengths_of(size: int = 10_000) -> list[int]:
    return [len(part) for part in parts_of(0, size)]


def chunks_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARK}


def on_disk(folder: Path) -> int:
    """What ``du`` says of the files in a folder."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                total += entry.stat().st_blocks * 512
            except FileNotFoundError:
                continue  # removed meanwhile
    return total - os.stat(folder / MARK).st_blocks * 512


def counted(folder: Path) -> int:
    return int((folder / MARK).read_text())


def soon() -> int:
    return time.time_ns() + HOUR


def test_what_was_put_is_found_by_all_and_counted(tmp_path):
    cache, other = (ChunkCache(tmp_path / "new" / "cache", 10**6) for _ in range(2))
    assert cache.get(name_of(1), lengths_of(), soon()) is None
    cache.put(name_of(1), parts_of(1), soon())
    for each in (cache, other, ChunkCache(tmp_path / "new" / "cache", 10**6)):
        assert each.get(name_of(1), lengths_of(), soon()) == parts_of(1)
        assert (each.hits, each.bytes) == (1, 10_000)
    assert cache.misses == 1
    fetched = []
    found = other.read(name_of(2), lengths_of(), lambda: fetched.append(1) or parts_of(2), soon())
    again = cache.read(name_of(2), lengths_of(), lambda: fetched.append(1) or parts_of(2), soon())
    assert found == again == parts_of(2)
    assert fetched == [1]
    assert counted(cache.folder) == on_disk(cache.folder) == 2 * 12_288


def test_what_is_found_takes_no_memory_of_its_own_and_outlives_its_removal(tmp_path):
    cache, size = ChunkCache(tmp_path, 3_000_000), 2_000_000
    cache.put(name_of(1), parts_of(1, size), soon())
    lengths, files = lengths_of(size), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    found = cache.get(name_of(1), lengths, soon())
    assert tracemalloc.get_traced_memory()[1] < size / 10
    tracemalloc.stop()
    assert name_of(1) in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) == files  # else a large window would need too many
    cache.put(name_of(2), parts_of(2, size), time.time_ns())
    assert chunks_in(tmp_path) == {name_of(2)}
    assert found == parts_of(1, size)
    del found
    assert name_of(1) not in Path("/proc/self/maps").read_text()


def flip(path):
    data = bytearray(path.read_bytes())
    data[4321] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "flipped bit": flip,
    "cut short": lambda path: os.truncate(path, 5000),
    "no checksum": lambda path: os.truncate(path, 10_000),
    "empty": lambda path: os.truncate(path, 0),
    "zeros, as after a crash": lambda path: path.write_bytes(bytes(10_000 + CHECKSUM)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "another chunk": lambda path: path.write_bytes((path.parent / name_of(2)).read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_chunk_is_fetched_anew(tmp_path, damage):
    cache = ChunkCache(tmp_path, 10**6)
    for number in (1, 2):
        cache.put(name_of(number), parts_of(number), soon())
    damage(tmp_path / name_of(1))
    assert cache.get(name_of(1), lengths_of(), soon()) is None
    assert chunks_in(tmp_path) == {name_of(2)}
    assert cache.read(name_of(1), lengths_of(), lambda: parts_of(1), soon()) == parts_of(1)
    assert cache.get(name_of(1), lengths_of(), soon()) == parts_of(1)
    assert cache.get(name_of(2), lengths_of(), soon()) == parts_of(2)


def hits_of(requests: list[int], room: int, recent: bool = False) -> list[bool]:
    """Which requests a cache of so many chunks can answer: by Belady's rule, or keeping what was used last."""
    following, later = [], {}
    for place in range(len(requests) - 1, -1, -1):
        following.append(later.get(requests[place], len(requests)))
        later[requests[place]] = place
    following.reverse()
    kept, found = {}, []
    for place, chunk in enumerate(requests):
        found.append(chunk in kept)
        kept[chunk] = -place if recent else following[place]
        if len(kept) > room:
            del kept[max(kept, key=kept.get)]
    return found


def test_it_has_as_many_hits_as_any_cache_can_have(tmp_path, monkeypatch):
    """Requests of epochs in random order, 10 chunks of 40 in the cache; the moments are right."""
    clock = [10**18]
    monkeypatch.setattr("time.time_ns", lambda: clock[0])
    monkeypatch.setattr("shards.cache._LOOK", float("inf"))  # look at all files each time
    rng, epochs, chunks, room = random.Random(0), 8, 40, 10
    requests = [chunk for _ in range(epochs + 2) for chunk in rng.sample(range(chunks), chunks)]
    cache, found = ChunkCache(tmp_path, room * 4096), []
    for place, chunk in enumerate(requests[: epochs * chunks]):
        clock[0] += 10**9
        following = requests.index(chunk, place + 1)
        before = cache.hits
        cache.read(name_of(chunk), [100], lambda: [bytes(100)], clock[0] + (following - place) * 10**9)
        found.append(cache.hits > before)
        assert on_disk(tmp_path) <= room * 4096
    best, recent = (hits_of(requests, room, each)[: len(found)] for each in (False, True))
    assert sum(found) == sum(best)
    later = [sum(found[a : a + chunks]) for a in range(chunks, len(found), chunks)]
    assert later == [room] * (epochs - 1)  # what is hit in an epoch was kept at its begin, so there cannot be more
    assert sum(recent) < sum(best) / 3


def test_what_is_needed_later_than_all_that_is_there_is_not_taken_in(tmp_path):
    cache, now = ChunkCache(tmp_path, 3 * 12_288), time.time_ns()
    for number in (1, 2, 3, 4):
        cache.put(name_of(number), parts_of(number), now + number * HOUR)
    assert chunks_in(tmp_path) == set(map(name_of, (1, 2, 3)))
    cache = ChunkCache(tmp_path, 3 * 12_288)  # it has looked now
    cache.put(name_of(5), parts_of(5), now + HOUR // 2)
    assert chunks_in(tmp_path) == set(map(name_of, (1, 2, 5)))
    cache.put(name_of(6), parts_of(6, 60_000), now)
    assert chunks_in(tmp_path) == set(map(name_of, (1, 2, 5)))  # nothing goes for what does not fit anyway


def test_a_run_that_ended_makes_room_and_one_that_goes_on_finds_what_it_needs_first(tmp_path):
    now = time.time_ns()
    cache = ChunkCache(tmp_path, 4 * 12_288)
    for number in (1, 2, 3, 4):
        cache.put(name_of(number), parts_of(number), now - 72 * HOUR + number * HOUR)  # due three days ago
    cache = ChunkCache(tmp_path, 4 * 12_288)
    cache.put(name_of(5), parts_of(5), now + 2 * HOUR)
    cache.put(name_of(6), parts_of(6), now + 3 * HOUR)
    assert chunks_in(tmp_path) == set(map(name_of, (1, 2, 5, 6)))
    cache = ChunkCache(tmp_path, 4 * 12_288)
    cache.put(name_of(7), parts_of(7), now - HOUR // 2)  # as late as a pause makes it
    cache.put(name_of(8), parts_of(8), now + HOUR)
    assert chunks_in(tmp_path) == set(map(name_of, (5, 6, 7, 8)))
    cache = ChunkCache(tmp_path, 4 * 12_288)
    cache.put(name_of(9), parts_of(9), now + HOUR)
    assert chunks_in(tmp_path) == set(map(name_of, (5, 7, 8, 9)))


def test_what_was_used_meanwhile_stays(tmp_path):
    now = time.time_ns()
    cache, other = (ChunkCache(tmp_path, 3 * 12_288) for _ in range(2))
    for number in (1, 2, 3):
        cache.put(name_of(number), parts_of(number), now + number * HOUR)
    cache = ChunkCache(tmp_path, 3 * 12_288)
    assert other.get(name_of(3), lengths_of(), now + HOUR // 4)
    cache._next_look = float("inf")
    cache.put(name_of(4), parts_of(4), now + HOUR // 2)
    assert chunks_in(tmp_path) == set(map(name_of, (1, 3, 4)))


def test_a_lower_limit_holds_from_the_start(tmp_path):
    cache, now = ChunkCache(tmp_path, 10**6), time.time_ns()
    for number in range(10):
        cache.put(name_of(number), parts_of(number), now + number * HOUR)
    ChunkCache(tmp_path, 5 * 12_288 + 7)
    assert chunks_in(tmp_path) == set(map(name_of, range(5)))


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(UserError, match=r"the cache .* holds something else; give an empty folder"):
        ChunkCache(tmp_path, 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    with pytest.raises(UserError, match=r"cannot use the cache .*precious: .*; give another folder"):
        ChunkCache(tmp_path / "precious", 10**6)
    with pytest.raises(UserError, match=r"the cache s3://bucket/x: must be a local path"):
        ChunkCache("s3://bucket/x", 10**6)
    cache = ChunkCache(tmp_path / "cache", 3 * 12_288)
    strange = [tmp_path / "cache" / name for name in ("notes.txt", "f" * 39, "." + "f" * 40)]
    for path in strange:  # somebody takes the folder for another one
        path.write_bytes(bytes(50_000))
    cache = ChunkCache(tmp_path / "cache", 3 * 12_288)
    for number in range(9):
        cache.put(name_of(number), parts_of(number), soon() - number)
    assert all(path.stat().st_size == 50_000 for path in strange)
    assert len(chunks_in(tmp_path / "cache") - {path.name for path in strange}) == 3


def test_threads_share_one_cache(tmp_path):
    limit = 8 * 12_288
    cache, wrong, most = ChunkCache(tmp_path, limit), [], []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(60):
            number = rng.randrange(30)
            due = time.time_ns() + rng.randrange(HOUR)
            parts = cache.read(name_of(number), lengths_of(), lambda number=number: parts_of(number), due)
            if parts != parts_of(number):
                wrong.append(number)
            most.append(on_disk(tmp_path))

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert cache.hits + cache.misses == 8 * 60
    assert cache.hits > 20
    assert 4 * 12_288 < max(most) <= limit
    assert counted(tmp_path) == on_disk(tmp_path)


def test_nobody_waits_for_a_process_that_stands_still_with_the_lock(tmp_path):
    cache = ChunkCache(tmp_path, 10**6)
    cache.put(name_of(1), parts_of(1), soon())
    with open(tmp_path / MARK, "rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX)
        began = time.monotonic()
        cache.put(name_of(2), parts_of(2), soon())
        assert time.monotonic() - began < 10
        assert cache.get(name_of(1), lengths_of(), soon()) == parts_of(1)
    assert chunks_in(tmp_path) == {name_of(1)}
    cache.put(name_of(2), parts_of(2), soon())
    assert chunks_in(tmp_path) == {name_of(1), name_of(2)}


PUT_FOR_EVER = """
import sys, time, itertools, threading
from shards.cache import ChunkCache
from tests.shards.test_cache import name_of, parts_of
cache = ChunkCache(sys.argv[1], 40_000_000)
data = parts_of(0, 4_000_000)
numbers = itertools.count()
def work():
    for number in numbers:
        cache.put(name_of(number), data, time.time_ns() + 10**15 - number * 10**9)
print("ready", flush=True)
for _ in range(3):
    threading.Thread(target=work).start()
"""


def test_killed_in_the_middle_of_writing(tmp_path):
    struck, data = 0, parts_of(0, 4_000_000)
    for begins in (False, True, False):
        folder = tmp_path / f"{begins}{struck}"
        living = ChunkCache(folder, 40_000_000)
        process = subprocess.Popen([sys.executable, "-c", PUT_FOR_EVER, folder], cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 30
            while not list(folder.glob(".*.partial")) or counted(folder) < 36_000_000:
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait(timeout=30)
        struck += bool(list(folder.glob(".*.partial")))
        assert on_disk(folder) <= 40_000_000
        # A job that goes on or one that begins: when it needs room, it clears away what is half-written.
        cache = ChunkCache(folder, 40_000_000) if begins else living
        for number in (-1, -2):
            cache.put(name_of(number + (1 << 100)), data, time.time_ns())
        assert not list(folder.glob(".*.partial"))
        assert counted(folder) == on_disk(folder) <= 40_000_000
        names = chunks_in(folder)
        assert len(names) >= 6
        assert all(cache.get(name, lengths_of(4_000_000), soon()) == data for name in names)
    assert struck  # else the kills prove nothing


def test_a_full_disk_is_told_once_and_the_cache_goes_on_with_what_it_has(tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        cache = ChunkCache(disk / "cache", 10**9)
        for number in range(20):
            assert cache.read(name_of(number), lengths_of(), lambda n=number: parts_of(n), soon()) == parts_of(number)
        told = capsys.readouterr().err
        assert told == f"cache {disk}/cache: No space left on device; going on with what is in it\n"
        assert chunks_in(disk / "cache") == set(map(name_of, range(5)))
        assert counted(disk / "cache") == on_disk(disk / "cache")
        assert cache.get(name_of(3), lengths_of(), soon()) == parts_of(3)
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        cache = ChunkCache(disk / "cache", 10**9)
        cache.put(name_of(7), parts_of(7), soon())
        assert cache.get(name_of(7), lengths_of(), soon()) == parts_of(7)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_files_that_may_not_grow_are_told_once(tmp_path, capsys):
    cache = ChunkCache(tmp_path, 10**9)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        for number in range(3):
            cache.put(name_of(number), parts_of(number), soon())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().err == f"cache {tmp_path}: File too large; going on with what is in it\n"
    assert chunks_in(tmp_path) == set()
    assert counted(tmp_path) == 0


def test_a_folder_that_is_removed_does_not_end_the_run(tmp_path, capsys):
    cache = ChunkCache(tmp_path / "cache", 10**9)
    (tmp_path / "cache" / MARK).unlink()
    (tmp_path / "cache").rmdir()
    for number in range(3):
        assert cache.read(name_of(number), lengths_of(), lambda n=number: parts_of(n), soon()) == parts_of(number)
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_a_count_that_was_lost_is_made_anew(tmp_path):
    cache = ChunkCache(tmp_path, 3 * 12_288)
    now = time.time_ns()
    for number in (3, 2, 1):
        cache.put(name_of(number), parts_of(number), now + number * HOUR)
    (tmp_path / MARK).write_bytes(b"")
    cache.put(name_of(0), parts_of(0), now)
    assert chunks_in(tmp_path) == set(map(name_of, (0, 1, 2)))
    assert counted(tmp_path) == on_disk(tmp_path)


def test_numbers_of_numpy_will_do(tmp_path):
    cache = ChunkCache(tmp_path, np.int64(10**6))
    cache.put(name_of(1), parts_of(1), soon())
    assert cache.get(name_of(1), lengths_of(), soon()) == parts_of(1)
