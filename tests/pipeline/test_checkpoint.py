import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import checkpoint, checksum
from pipeline.checkpoint import BrokenCheckpointError, Checkpoint
from shards.errors import UserError
from tests.pipeline.indices import with_changes
from tests.pipeline.parameters import parameters

SHAPES = {"a": (2, 3), "b": (4,)}


def write(folder, samples, best=False, shift=0.0):
    pieces = [
        ("weight", "a", 0, torch.arange(4.0) + shift),
        ("weight", "a", 4, torch.arange(4.0, 6.0) + shift),
        ("weight", "b", 0, torch.full((4,), 9.0) + shift),
        ("exp_avg", "b", 0, torch.full((4,), 0.5)),
    ]
    return checkpoint.save(folder, samples, pieces, SHAPES, {"note": samples}, best)


@pytest.mark.usefixtures("alone")
class TestOneRank:
    def test_what_is_written_is_read(self, tmp_path):
        path = write(tmp_path, 64)
        found = Checkpoint(path)
        found.verify()
        assert found.samples == 64
        assert found.state == {"note": 64}
        assert found.read("weight", "a", 1, 4).tolist() == [1, 2, 3, 4]  # across two pieces
        weights = parameters(found)
        assert weights["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert (tmp_path / "latest").read_text().strip() == path.name
        assert not list(tmp_path.glob(".*"))

    def test_who_changes_what_was_read_changes_no_file(self, tmp_path):
        path = write(tmp_path, 64)
        found = Checkpoint(path)
        for values in (found.read("weight", "b", 0, 4), found.read("weight", "a", 0, 6)):  # of one piece, and of two
            values.fill_(-1)
        found.close()
        Checkpoint(path).verify()
        assert Checkpoint(path).read("weight", "b", 0, 4).tolist() == [9, 9, 9, 9]

    def test_what_is_not_there_is_another_model(self, tmp_path):
        found = Checkpoint(write(tmp_path, 64))
        with pytest.raises(UserError, match=r"holds no weight of c .* another model"):
            found.read("weight", "c", 0, 1)
        with pytest.raises(UserError, match=re.escape("no weight of a at [6, 8)")):
            found.read("weight", "a", 4, 4)

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux how much of files is in memory")
    def test_what_was_read_of_files_leaves_memory(self, tmp_path, monkeypatch):
        def mapped() -> int:
            return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

        monkeypatch.setattr("pipeline.mapped.AT_ONCE", 2**23)
        numbers = torch.arange(2**24, dtype=torch.float32)  # 64 MiB
        found = Checkpoint(checkpoint.save(tmp_path, 64, [("weight", "a", 0, numbers)], {"a": (2**24,)}, {}))
        before, most = mapped(), 0
        for start in range(0, 2**24, 2**20):
            assert torch.equal(found.read("weight", "a", start, 2**20), numbers[start : start + 2**20])
            most = max(most, mapped() - before)
        assert most < 2**25
        found.close()
        assert found.read("weight", "a", 3, 2).tolist() == [3, 4]

    def test_keeps_the_newest_and_the_best(self, tmp_path):
        for samples in (10, 20, 30, 40, 50):
            write(tmp_path, samples, best=samples == 10)
        checkpoint.prune(tmp_path, keep=2)
        assert [path.name[-2:] for path in checkpoint.whole_checkpoints(tmp_path)] == ["50", "40", "10"]
        assert checkpoint.pointer(tmp_path, "best").name.endswith("10")
        assert checkpoint.pointer(tmp_path, "latest").name.endswith("50")

    @pytest.mark.parametrize("harm", ["cut", "flip", "remove", "no index"])
    def test_a_broken_newest_one_is_passed_over_with_a_warning(self, tmp_path, harm, capsys):
        write(tmp_path, 10)
        newest = write(tmp_path, 20)
        file = newest / "rank-00000.safetensors"
        content = file.read_bytes()
        if harm == "cut":
            file.write_bytes(content[:-8])
        elif harm == "flip":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "remove":
            file.unlink()
        else:
            (newest / "checkpoint.json").write_text('{"samples": 20')
        assert checkpoint.newest(tmp_path).samples == 10
        assert "falling back" in capsys.readouterr().err
        with pytest.raises(BrokenCheckpointError):
            Checkpoint(newest).verify()

    def test_falling_back_is_said_only_where_there_is_something_to_fall_back_to(self, tmp_path, capsys):
        for samples in (10, 20):
            (write(tmp_path, samples) / "rank-00000.safetensors").unlink()
        assert checkpoint.newest(tmp_path) is None
        first, second = capsys.readouterr().err.splitlines()
        assert re.match(r"warning: .*000020/.* is missing .*\(falling back to the one before\)", first)
        assert re.match(r"warning: .*000010/.* is missing", second)
        assert "falling back" not in second

    def test_a_file_that_the_disk_does_not_give_is_passed_over(self, tmp_path, monkeypatch, capsys):
        write(tmp_path, 10)
        newest, digest = write(tmp_path, 20), checksum.hashlib.file_digest

        def of_a_broken_disk(file, *how):
            if Path(file.name).parent == newest:
                raise OSError(errno.EIO, "Input/output error")
            return digest(file, *how)

        monkeypatch.setattr(checksum.hashlib, "file_digest", of_a_broken_disk)
        assert checkpoint.newest(tmp_path).samples == 10
        assert "000020/rank-00000.safetensors cannot be read: Input/output error" in capsys.readouterr().err

    def test_a_file_that_is_no_safetensors_is_broken(self, tmp_path):
        path = write(tmp_path, 10)
        (path / "rank-00000.safetensors").write_bytes(b"x" * (path / "rank-00000.safetensors").stat().st_size)
        for read in (Checkpoint(path).counts, lambda: Checkpoint(path).read("weight", "a", 0, 1)):
            with pytest.raises(BrokenCheckpointError, match=r"000010/rank-00000\.safetensors cannot be read: "):
                read()

    @pytest.mark.parametrize(
        "index",
        [
            '{"format_version": 1}', "[]", "null", '{"format_version": "1"}', {"files": [1]}, {"files": [{"bytes": 1}]},
            {"samples": None}, {"shapes": {"a": 3}}, {"state": []}, {"world_size": "two"},
        ],
    )  # fmt: skip
    def test_an_index_that_is_damaged_is_passed_over(self, tmp_path, index, capsys):
        write(tmp_path, 10)
        path = write(tmp_path, 20) / "checkpoint.json"
        path.write_text(index if isinstance(index, str) else with_changes(path, index))
        assert checkpoint.newest(tmp_path).samples == 10
        assert "000020 has no readable checkpoint.json" in capsys.readouterr().err

    def test_an_index_with_another_number_is_passed_over(self, tmp_path, capsys):
        write(tmp_path, 10)
        path = write(tmp_path, 20) / "checkpoint.json"
        path.write_text(path.read_text().replace('"samples": 20', '"samples": 21'))
        assert checkpoint.newest(tmp_path).samples == 10
        assert "checkpoint.json: it does not have the checksum it was written with" in capsys.readouterr().err

    def test_an_index_of_format_2_had_no_checksum(self, tmp_path):
        path = write(tmp_path, 10) / "checkpoint.json"
        index = json.loads(path.read_text())
        del index["xxh3_128"]
        path.write_text(json.dumps(index | {"format_version": 2}))
        assert checkpoint.newest(tmp_path).samples == 10

    @pytest.mark.parametrize("name", ["../rank-00000.safetensors", "/etc/passwd", "..", "", "checkpoint.json"])
    def test_an_index_names_files_of_ranks_and_no_others(self, tmp_path, name):
        path = write(tmp_path, 10) / "checkpoint.json"
        files = json.loads(path.read_text())["files"]
        path.write_text(with_changes(path, {"files": [files[0] | {"name": name}]}))
        with pytest.raises(BrokenCheckpointError, match=re.escape(f"checkpoint.json: it names a file {name!r}")):
            Checkpoint(path.parent)

    def test_folders_with_other_names_are_no_checkpoints(self, tmp_path):
        path = write(tmp_path, 10)
        shutil.copytree(path, tmp_path / "samples-old")
        checkpoint.prune(tmp_path, 2)
        assert checkpoint.whole_checkpoints(tmp_path) == [path]
        assert (tmp_path / "samples-old").is_dir()

    def test_a_half_written_folder_is_no_checkpoint_and_is_overwritten(self, tmp_path):
        partial = tmp_path / ".samples-000000000010.partial"
        partial.mkdir()
        (partial / "rank-00007.safetensors").write_bytes(b"left by a kill")
        assert checkpoint.newest(tmp_path) is None
        path = write(tmp_path, 10)
        assert sorted(file.name for file in path.iterdir()) == ["checkpoint.json", "rank-00000.safetensors"]

    def test_saving_the_same_place_again_replaces_it(self, tmp_path):
        write(tmp_path, 10)
        write(tmp_path, 10, shift=1.0)
        assert checkpoint.newest(tmp_path).read("weight", "b", 0, 1).item() == 10.0

    def test_a_newer_format_is_refused(self, tmp_path):
        path = write(tmp_path, 10) / "checkpoint.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
        with pytest.raises(UserError, match="newer Patchmill"):
            checkpoint.newest(tmp_path)
