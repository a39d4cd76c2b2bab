"""Saving beside the loop: what is written is what was there when it began, and no failure is missed."""

import os
import re
import subprocess
import threading
import weakref
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, hostcopy, rankfile, saver
from pipeline.checkpoint import Checkpoint
from pipeline.config import TrainSettings
from pipeline.hostcopy import HostCopy
from pipeline.lookout import Lookout
from pipeline.saver import Saver
from pipeline.settings import check, merge
from shards.errors import PatchmillError
from tests.ranks import run_on_ranks

SHAPES = {"a": (2, 3), "b": (4,)}
SETTINGS = {"duration": "9 steps", "global_batch": 8, "data": {"train": "-"}, "model": {"name": "vit_b16"}}


def saver_of(folder: Path, keep_every: int | None = None, **over) -> Saver:
    return Saver(folder, SHAPES, check(TrainSettings, merge(SETTINGS, {"checkpoint": over}), "test"), keep_every)


def pieces(live: torch.Tensor) -> list:
    return [("weight", "a", 0, live[:6]), ("weight", "b", 0, live[6:])]


@pytest.fixture
def gate(monkeypatch):
    """Holds the writing of files up until it is set."""
    opened, write = threading.Event(), checkpoint.write_rank_file

    def write_later(*arguments) -> dict:
        assert opened.wait(30)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_rank_file", write_later)
    return opened


@pytest.mark.usefixtures("alone")
class TestOneRank:
    def test_the_loop_goes_on_and_changes_what_is_being_written(self, tmp_path, gate):
        live, state = torch.arange(10.0), {"probe": {"top1": 1}}
        with saver_of(tmp_path / "run" / "checkpoints") as saving:
            path = saving.save(8, pieces(live), state)
            live.fill_(-1)
            state["probe"]["top1"] = 2
            assert not path.exists()
            gate.set()
            saving.wait()
            found = Checkpoint(path)
            found.verify()
            assert found.read("weight", "a", 0, 6).tolist() == [0, 1, 2, 3, 4, 5]
            assert found.read("weight", "b", 0, 4).tolist() == [6, 7, 8, 9]
            assert found.state == {"probe": {"top1": 1}}

    def test_the_next_save_and_the_end_wait_for_the_one_before(self, tmp_path, gate):
        live = torch.arange(10.0)
        threading.Timer(0.3, gate.set).start()
        with saver_of(tmp_path) as saving:
            first = saving.save(8, pieces(live), {})
            second = saving.save(16, pieces(live + 1), {})  # into the memory that the first was copied to
            assert Checkpoint(first).read("weight", "a", 0, 1).item() == 0
        assert Checkpoint(second).read("weight", "a", 0, 1).item() == 1

    def test_a_failure_is_raised_by_a_look_and_by_the_next_save_and_told_at_the_end(self, tmp_path, capsys):
        live = torch.arange(10.0)
        for how in ("look", "save", "end"):
            (tmp_path / how).mkdir()
            with saver_of(tmp_path / how) as saving:
                lookout = Lookout(None, saver=saving)
                lookout.look(now=True)
                (tmp_path / how / f".{checkpoint.path_of(tmp_path, 8).name}.partial").write_text("in the way")
                saving.save(8, pieces(live), {})
                if how == "end":
                    continue
                while not saving.failed:
                    pass
                with pytest.raises(
                    PatchmillError, match=r"cannot write checkpoint .*samples-000000000008: .*make room"
                ):
                    lookout.look(now=True) if how == "look" else saving.save(16, pieces(live), {})
                lookout.look(now=True)  # it was told
            assert capsys.readouterr().err.count("cannot write checkpoint") == (how == "end")

    def test_without_memory_for_a_copy_it_says_so_and_the_loop_waits(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(saver, "free_memory", lambda: 10.0)
        live = torch.arange(10.0)
        with saver_of(tmp_path) as saving:
            for samples in (8, 16):
                saving.prepare()
                path = saving.save(samples, pieces(live), {})
                Checkpoint(path).verify()
        told = capsys.readouterr().err
        assert told.count("warning: saving beside the loop wants") == 1
        assert "checkpoint.asynchronous = false" in told

    def test_a_copy_leaves_memory_for_what_is_on_its_way_to_the_disk(self, tmp_path, monkeypatch, capsys):
        size = 3 * 4 * 10  # weights and two states of AdamW, float32
        for free, beside in ((size, False), (1.25 * size, True)):
            monkeypatch.setattr(saver, "free_memory", lambda free=free: float(free))
            with saver_of(tmp_path / str(free)) as saving:
                saving.save(8, pieces(torch.arange(10.0)), {})
            assert ("the loop waits" in capsys.readouterr().err) != beside

    def test_it_may_be_switched_off(self, tmp_path, capsys):
        with saver_of(tmp_path, asynchronous=False) as saving:
            Checkpoint(saving.save(8, pieces(torch.arange(10.0)), {})).verify()
        assert capsys.readouterr().err == ""

    def test_it_keeps_the_newest_and_the_first_of_each_period(self, tmp_path):
        with saver_of(tmp_path, keep_every=30) as saving:
            for samples in range(8, 97, 8):
                saving.save(samples, pieces(torch.arange(10.0)), {})
        assert sorted(map(checkpoint.samples_of, checkpoint.whole_checkpoints(tmp_path))) == [32, 64, 88, 96]

    def test_what_is_newer_than_the_latest_was_broken_and_goes(self, tmp_path):
        with saver_of(tmp_path) as saving:
            for samples in (8, 16, 24):
                saving.save(samples, pieces(torch.arange(10.0)), {})
            saving.wait()
            (tmp_path / "samples-000000000024" / "rank-00000.safetensors").write_bytes(b"broken")
            assert checkpoint.newest(tmp_path).samples == 16
            saving.save(20, pieces(torch.arange(10.0)), {})
        assert sorted(map(checkpoint.samples_of, checkpoint.whole_checkpoints(tmp_path))) == [16, 20]
        assert checkpoint.pointer(tmp_path, "latest").name.endswith("20")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may make a file that cannot be deleted")
    def test_what_cannot_be_deleted_is_told_and_tried_again_after_the_next_save(self, tmp_path, capsys):
        with saver_of(tmp_path) as saving:
            paths = [saving.save(samples, pieces(torch.arange(10.0)), {}) for samples in (8, 16)]
            saving.wait()
            stubborn = paths[0] / "stubborn"
            stubborn.mkdir()
            if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", stubborn], timeout=10, check=False).returncode:
                pytest.skip("may not mount a disk of its own")
            doomed = tmp_path / f".{paths[0].name}.partial" / "stubborn"
            try:
                for samples in (24, 32):
                    saving.save(samples, pieces(torch.arange(10.0)), {})
                    saving.wait()
                    told = capsys.readouterr().err
                    assert "warning: old checkpoints in" in told
                    assert "tried again after the next save" in told
                there = list(map(checkpoint.samples_of, checkpoint.whole_checkpoints(tmp_path)))
                assert there == [32, 24]
                with saver_of(tmp_path):  # nor does it keep a run from going on
                    assert "warning: old checkpoints in" in capsys.readouterr().err
            finally:
                subprocess.run(["umount", doomed if doomed.exists() else stubborn], timeout=10, check=True)
            saving.save(40, pieces(torch.arange(10.0)), {})
            saving.wait()
        assert capsys.readouterr().err == ""
        assert not list(tmp_path.glob(".*"))

    def test_with_a_smaller_keep_a_full_disk_has_room_again(self, tmp_path, monkeypatch):
        with saver_of(tmp_path, keep=5) as saving:
            for samples in (8, 16, 24, 32, 40):
                saving.save(samples, pieces(torch.arange(10.0)), {})

        def usage(path):  # room for five of 100 bytes
            return type("Usage", (), {"free": 600 - 100 * len(checkpoint.whole_checkpoints(tmp_path))})

        monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)
        with pytest.raises(PatchmillError, match=r"set a smaller checkpoint\.keep"), saver_of(tmp_path, keep=5):
            pass
        for broken in (32, 40):  # the run goes on from the one before
            (checkpoint.path_of(tmp_path, broken) / "rank-00000.safetensors").write_bytes(b"broken")
        (tmp_path / "latest").write_text("samples-000000000024\n")
        with saver_of(tmp_path, keep=2) as saving:
            there = list(map(checkpoint.samples_of, checkpoint.whole_checkpoints(tmp_path)))
            assert there == [24, 16]
            assert checkpoint.newest(tmp_path).samples == 24
            saving.save(32, pieces(torch.arange(10.0)), {})
        assert checkpoint.newest(tmp_path).samples == 32

    def test_what_a_killed_save_left_goes_at_the_start(self, tmp_path):
        left = tmp_path / ".samples-000000000008.partial"
        left.mkdir()
        with saver_of(tmp_path):
            assert not left.exists()

    @pytest.mark.parametrize("header", [True, False])  # and values
    def test_a_file_that_does_not_hold_what_was_written_is_no_checkpoint(self, tmp_path, monkeypatch, header):
        read_back = rankfile._read_back

        def read_back_wrong(file, start: int, found) -> int:
            file.flush()
            if header == (start == 0):
                byte = os.pread(file.fileno(), 1, start + 9)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), start + 9)
            return read_back(file, start, found)

        monkeypatch.setattr(rankfile, "_read_back", read_back_wrong)
        with saver_of(tmp_path) as saving:
            saving.save(8, pieces(torch.arange(10.0)), {})
            with pytest.raises(PatchmillError, match="does not hold what was written"):
                saving.wait()
        assert checkpoint.newest(tmp_path) is None

    def test_without_a_copy_one_piece_is_in_memory_at_a_time(self, tmp_path):
        made = []

        def from_nvme():
            for number in range(8):
                assert sum(each() is not None for each in made) <= 1
                tensor = torch.full((4,), float(number))
                made.append(weakref.ref(tensor))
                yield "weight", "b", 4 * number, tensor

        with saver_of(tmp_path, asynchronous=False) as saving:
            found = Checkpoint(saving.save(8, from_nvme(), {}))
        found.verify()
        assert found.read("weight", "b", 0, 32).tolist() == [float(value // 4) for value in range(32)]

    def test_a_folder_gets_its_name_when_all_in_it_is_on_the_disk_and_the_pointer_when_the_name_is(
        self, tmp_path, monkeypatch
    ):
        calls, fsync, replace = [], os.fsync, os.replace

        def fsync_told(descriptor: int) -> None:
            fsync(descriptor)
            calls.append(("on disk", os.readlink(f"/proc/self/fd/{descriptor}")))

        def replace_told(old: Path, new: Path) -> None:
            replace(old, new)
            calls.append(("named", str(new)))

        monkeypatch.setattr(os, "fsync", fsync_told)
        monkeypatch.setattr(os, "replace", replace_told)
        with saver_of(tmp_path) as saving:
            path = saving.save(8, pieces(torch.arange(10.0)), {})
        partial = path.with_name(f".{path.name}.partial")
        index, named = (calls.index(("named", str(each))) for each in (partial / "checkpoint.json", path))
        assert calls.index(("on disk", str(partial / "rank-00000.safetensors"))) < named
        assert calls.index(("on disk", str(partial / ".checkpoint.json.partial"))) < index
        assert ("on disk", str(partial)) in calls[index:named]
        assert ("on disk", str(tmp_path)) in calls[named : calls.index(("named", str(tmp_path / "latest")))]

    def test_a_disk_without_room_is_told_at_the_start(self, tmp_path, monkeypatch):
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 119}))
        with pytest.raises(PatchmillError, match=r"takes 1.2e-07 GB, and 1.19e-07 GB .* are free; make room"):
            saver_of(tmp_path / "not" / "made")


def test_a_copy_is_written_over_the_one_before_and_takes_memory_once(monkeypatch):
    monkeypatch.setattr(hostcopy, "SLAB", 16)
    copy, addresses = HostCopy(), []
    for shift in (0.0, 100.0):
        live = [torch.arange(float(size)) + shift for size in (10, 5, 3, 40, 1)]
        taken = copy.take([("weight", str(number), 0, each) for number, each in enumerate(live)])
        assert [each.tolist() for *_, each in taken] == [each.tolist() for each in live]
        addresses.append([each.data_ptr() for *_, each in taken])
    assert addresses[0] == addresses[1]
    assert len(set(addresses[0])) == 5


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much memory is held")
def test_memory_that_was_reserved_is_there_before_the_first_copy(alone, tmp_path):
    def held() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    live, size = torch.zeros(2**22), 3 * 2**24  # bytes, with two states of AdamW
    settings = check(TrainSettings, SETTINGS, "test")
    with Saver(tmp_path, {"a": live.shape}, settings) as saving:
        before = held()
        for _ in range(3):  # as often as there is a line to log
            saving.prepare()
        saving.wait()
        there = held()
        assert there - before == pytest.approx(size, rel=0.1)
        pieces = [(kind, "a", 0, live) for kind in ("weight", "exp_avg", "exp_avg_sq")]
        path = saving.save(8, pieces, {})
        saving.wait()
        Checkpoint(path).verify()
        assert held() - there < size / 4


def test_where_the_copys_memory_cannot_be_taken_the_loop_waits_for_each_save(alone, tmp_path, monkeypatch, capsys):
    def reserve(*_):
        raise RuntimeError("cannot be pinned")

    monkeypatch.setattr(HostCopy, "reserve", reserve)
    live = torch.zeros(4)
    with Saver(tmp_path, {"a": live.shape}, check(TrainSettings, SETTINGS, "test")) as saving:
        for samples in (8, 16):
            path = saving.save(samples, [("weight", "a", 0, live)], {})
            assert path.is_dir()  # it is there when the call returns
    told = capsys.readouterr().err
    assert told.count("warning: no memory for a copy to save from beside the loop (rank 0: cannot be pinned)") == 1


def test_what_fails_on_one_rank_is_raised_on_both_at_the_same_look(tmp_path):
    ranks = run_on_ranks(Path(__file__).with_name("worker_saver.py"), 2, tmp_path)
    assert ranks[0]["step"] == ranks[1]["step"] > 0
    for rank in ranks:
        assert "cannot write checkpoint" in rank["error"]
        assert "File too large" in rank["error"]  # rank 1's limit
        assert rank["then"] == 16
    assert not (tmp_path / "samples-000000000008").exists()
