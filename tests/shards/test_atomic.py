"""Files and folders that appear whole or not at all."""

import os

import pytest

from shards import atomic


def names(folder):
    return sorted(os.listdir(folder))


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
