"""``patchmill checkpoint``: list, show, verify and diff, between different numbers of ranks too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from pipeline import checkpoint
from tests.pipeline.indices import with_changes

SHAPES = {"a": (2, 3), "b": (40,)}
STATE = {
    "steps": 5, "commit": "abc", "versions": {"torch": "9.9"}, "val": {"top1": 0.5}, "loader": {"data": "d1e2"},
    "model": {"name": "vit_b16"},
    "settings": {"global_batch": 8, "engine": {"kind": "deepspeed", "zero_stage": 2, "precision": "bfloat16"}},
}  # fmt: skip


def values(shift: float = 0.0) -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        (kind, name): torch.randn(torch.Size(shape).numel(), generator=generator)
        for name, shape in SHAPES.items()
        for kind in ("weight", "exp_avg")
    }
    found["exp_avg", "b"][7] += shift
    return found | {("step", "optimizer"): torch.tensor([5.0])}


def write(folder: Path, samples: int, ranks: int, found: dict, monkeypatch) -> Path:
    """Write a checkpoint as ``ranks`` ranks would, one after the other in this process."""
    files = []

    def save(rank: int) -> Path:
        pieces = []
        for (kind, name), tensor in found.items():
            start, stop = (len(tensor) * (rank + at) // ranks for at in (0, 1))
            if stop > start:
                pieces.append((kind, name, start, tensor[start:stop]))
        return checkpoint.save(folder / f"of-{rank}", samples, pieces, SHAPES, STATE)

    final = folder / f"samples-{samples:012d}"
    for rank in range(ranks):
        path = save(rank)
        index = path / "checkpoint.json"
        (file,) = json.loads(index.read_text())["files"]
        files.append(file | {"name": f"rank-{rank:05d}.safetensors"})
        final.mkdir(exist_ok=True)
        shutil.move(path / file["name"], final / files[-1]["name"])
        (final / "checkpoint.json").write_text(with_changes(index, {"files": files, "world_size": ranks}))
        shutil.rmtree(folder / f"of-{rank}")
    (folder / "latest").write_text(final.name)
    return final


def run(*arguments: object) -> dict | list:
    done = CliRunner().invoke(app, ["checkpoint", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def stage(tmp_path, alone, monkeypatch) -> Path:
    folder = tmp_path / "stage" / "checkpoints"
    write(folder, 16, 3, values(), monkeypatch)
    write(folder, 40, 2, values(), monkeypatch)
    return tmp_path / "stage"


def test_list_and_show_tell_what_a_checkpoint_is_of(stage):
    first, second = run("list", stage)
    assert (first["samples"], first["world_size"], first["pointers"], first["problem"]) == (16, 3, [], None)
    assert (second["samples"], second["world_size"], second["pointers"]) == (40, 2, ["latest"])
    assert first["digest"] != second["digest"]
    shown = run("show", stage)
    assert shown == second
    assert shown["step"] == 5
    assert shown["zero_stage"] == 2
    assert shown["data"] == "d1e2"
    assert shown["versions"] == {"torch": "9.9"}
    assert shown["kinds"] == {"weight": 4 * 46, "exp_avg": 4 * 46, "step": 4}
    assert shown["parameters"] == 46
    assert run("show", stage / "checkpoints" / first["name"]) == first
    table = CliRunner().invoke(app, ["checkpoint", "list", str(stage)]).stdout
    assert "samples-000000000040" in table
    assert "latest" in table
    assert "ZeRO 2" in table


def test_diff_compares_values_whatever_ranks_wrote_them(stage, monkeypatch):
    one, other = sorted((stage / "checkpoints").glob("samples-*"))
    assert run("diff", one, other)["same"]
    changed = write(stage / "checkpoints", 48, 4, values(0.25), monkeypatch)
    found = run("diff", one, changed)
    assert not found["same"]
    assert found["world_sizes"] == [3, 4]
    assert found["kinds"]["weight"] == {"tensors": 2, "differ": 0, "largest": 0.0, "parameter": None}
    moments = found["kinds"]["exp_avg"]
    assert (moments["differ"], moments["parameter"]) == (1, "b")
    assert moments["largest"] == pytest.approx(0.25, rel=1e-6)
    assert [(row["kind"], row["parameter"]) for row in found["differences"]] == [("exp_avg", "b")]

    more = values() | {("ema", "a"): torch.zeros(6)}
    more["weight", "a"][0] = float("nan")
    found = run("diff", one, write(stage / "checkpoints", 56, 2, more, monkeypatch))
    assert [row["only_in"] for row in found["differences"]] == ["second", None]
    assert found["kinds"]["weight"]["largest"] is None  # a difference to no number
    text = CliRunner().invoke(app, ["checkpoint", "diff", str(one), str(stage)]).stdout
    assert "ema of a is only in the second" in text
    assert "not the same" in text


def test_verify_ends_with_code_1_where_one_is_broken(stage):
    assert [each["whole"] for each in run("verify", stage)] == [True, True]
    file = stage / "checkpoints" / "samples-000000000016" / "rank-00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert [each["problem"] for each in run("list", stage)] == [None, None]  # checksums are not looked at
    done = CliRunner().invoke(app, ["checkpoint", "verify", str(stage)])
    assert f"{file} does not have the checksum" in done.stdout
    assert "1 of 2 checkpoints are broken" in str(done.exception)
    assert done.exception.exit_code == 1
    file.unlink()
    assert "missing" in run("list", stage)[0]["problem"]
    (file.parent / "checkpoint.json").unlink()
    assert "no readable checkpoint.json" in run("list", stage)[0]["problem"]
    done = CliRunner().invoke(app, ["checkpoint", "list", str(stage.parent / "no")])
    assert "there is no checkpoint in" in str(done.exception)
    assert done.exception.exit_code == 2


def test_one_that_this_patchmill_cannot_read_is_a_row_with_its_problem(stage):
    index = stage / "checkpoints" / "samples-000000000016" / "checkpoint.json"
    good = index.read_text()
    for bad, problem in (
        (json.dumps(json.loads(good) | {"format_version": 99}), "newer Patchmill"),
        ("[]", "no readable checkpoint.json"),
    ):
        index.write_text(bad)
        rows = run("list", stage)
        assert problem in rows[0]["problem"]
        assert rows[1]["problem"] is None
        table = CliRunner().invoke(app, ["checkpoint", "list", str(stage)], catch_exceptions=False).stdout
        assert "BROKEN" in table
        assert rows[0]["problem"] in table
        done = CliRunner().invoke(app, ["checkpoint", "verify", str(stage), "--json"])
        assert [each["whole"] for each in json.loads(done.stdout)] == [False, True]
        assert problem in json.loads(done.stdout)[0]["problem"]
    index.write_text(good)
    file = index.parent / "rank-00000.safetensors"
    file.write_bytes(b"x" * file.stat().st_size)  # as long as it was
    assert "cannot be read" in run("list", stage)[0]["problem"]
