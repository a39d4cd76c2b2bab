"""Files and folders that appear whole or not at all."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Thread

import pytest

from shards import atomic
from shards.atomic import LOCK, is_held, only_one
from shards.errors import PatchmillError


def names(folder):
    return sorted(os.listdir(folder))


def test_who_shares_a_folder_is_seen_by_who_asks(tmp_path):
    assert not is_held(tmp_path, unknown=True, shared=True)
    with only_one(tmp_path, "rank", shared=True):
        assert is_held(tmp_path, unknown=False, shared=True)
        assert not is_held(tmp_path, unknown=True)
    assert not is_held(tmp_path, unknown=True, shared=True)


def test_whole_file_appears_on_a_clean_exit_only(tmp_path):
    target = tmp_path / "new" / "file"
    with atomic.whole_file(target) as partial:
        partial.write_text("content")
        assert not target.exists()
    assert target.read_text() == "content"
    assert names(target.parent) == ["file"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing(tmp_path):
    atomic.write_text(tmp_path / "file", "old")

    def fail_half_way():
        with atomic.whole_file(tmp_path / "file") as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".file.partial").write_text("long leftover of a killed process")
    atomic.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_folder_replaces_an_older_one_whole(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "leftover").touch()
    partial = atomic.partial_folder(tmp_path / "folder")
    (partial / "new").touch()
    assert names(tmp_path / "folder") == ["old"]
    atomic.commit_folder(partial, tmp_path / "folder")
    assert names(tmp_path / "folder") == ["new"]
    assert names(tmp_path) == ["folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from shards import atomic
folder, left = Path(sys.argv[1]), int(sys.argv[2])
replace = os.replace
def replace_then_die(*paths):
    global left
    replace(*paths)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace_then_die
partial = atomic.partial_folder(folder)
(partial / "new").touch()
atomic.commit_folder(partial, folder)
"""


@pytest.mark.parametrize(("renames", "there"), [(1, "old"), (2, "new")])
def test_a_kill_between_the_renames_of_a_replacement_loses_nothing(tmp_path, renames, there):
    def killed():
        done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a [b]", str(renames)], timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL

    for mend in (lambda: atomic.put_back(tmp_path), lambda: atomic.partial_folder(tmp_path / "a [b]")):
        (tmp_path / "a [b]").mkdir()
        (tmp_path / "a [b]" / "old").touch()
        killed()
        assert ".a [b].replaced.partial" in names(tmp_path)
        mend()
        assert names(tmp_path / "a [b]") == [there]
        assert ".a [b].replaced.partial" not in names(tmp_path)
        shutil.rmtree(tmp_path / "a [b]")


def test_of_many_that_take_turns_none_is_beside_another_and_nothing_is_left(tmp_path):
    folder, count = tmp_path / "folder", tmp_path / "count"
    count.write_text("0")

    def take_turns():
        for _ in range(10):
            with only_one(folder, "turn", wait=60):
                before = int(count.read_text())
                assert is_held(folder, unknown=False)
                count.write_text(str(before + 1))

    threads = [Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == "40"
    assert not is_held(folder, unknown=True)
    assert not list(folder.iterdir())


def test_a_folder_that_has_another_name_since_keeps_its_lock_and_the_new_one_has_its_own(tmp_path):
    folder = tmp_path / "folder"
    with only_one(folder, "first"):
        folder.rename(tmp_path / "aside")
        with only_one(folder, "second"):
            assert is_held(tmp_path / "aside", unknown=False)
            assert is_held(folder, unknown=False)
        assert is_held(tmp_path / "aside", unknown=False)


def test_where_nothing_can_be_written_that_is_told(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(PatchmillError, match=r"cannot write to .*file/folder: Not a directory"),
        only_one(tmp_path / "file/folder", "turn"),
    ):
        pass


def test_a_folder_that_others_remove_when_they_are_through_can_be_had(tmp_path):
    folder, errors = tmp_path / "base" / "own", []

    def take_turns():
        for _ in range(200):
            try:
                with only_one(folder, "turn", wait=60):
                    pass
            except PatchmillError as error:
                errors.append(error)
            for each in (folder, folder.parent):
                with suppress(OSError):
                    each.rmdir()

    threads = [Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_who_may_write_to_a_folder_may_lock_it_and_a_link_in_place_of_its_lock_is_not_followed(tmp_path):
    folder, private = tmp_path / "folder", tmp_path / "private"
    folder.mkdir()
    folder.chmod(0o770)
    with only_one(folder, "turn"):
        assert (folder / LOCK).stat().st_mode & 0o777 == 0o660
    private.touch(0o600)
    folder.chmod(0o777)  # anybody may have made the link
    (folder / LOCK).symlink_to(private)
    with pytest.raises(PatchmillError, match="folder: Too many levels of symbolic links"), only_one(folder, "turn"):
        pass
    assert private.stat().st_mode & 0o777 == 0o600
