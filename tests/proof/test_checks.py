"""What must hold does not hold over nothing."""

import json

import torch
from safetensors.torch import save_file

from tests.proof.checks import _checked, _equal, _losses, _one_history, _quarantined


def stage(folder, samples=(120, 240), weight=1.0):
    (folder / "checkpoints/samples-000000000240").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"samples": at, "loss": 1 / at}) + "\n" for at in samples))
    save_file({"weight": torch.tensor([weight])}, folder / "checkpoints/samples-000000000240/rank-00000.safetensors")
    return folder


def test_one_history_is_that_of_the_undisturbed_run(tmp_path):
    whole = stage(tmp_path / "whole")
    assert _one_history(stage(tmp_path / "same"), whole)[0]
    for name, samples in {"twice": (120, 240, 240), "half": (240,), "none": ()}.items():
        assert not _one_history(stage(tmp_path / name, samples), whole)[0], name
    assert not _one_history(tmp_path / "none", tmp_path / "none")[0]
    assert not _losses(tmp_path / "none", tmp_path / "none")[0]
    assert _losses(whole, whole)[0]
    lines = (whole / "metrics.jsonl").read_text()
    (stage(tmp_path / "nan") / "metrics.jsonl").write_text(lines.replace(str(1 / 240), "NaN"))
    assert not _losses(tmp_path / "nan", whole)[0]


def test_weights_are_equal_where_there_are_some_and_they_are_equal(tmp_path):
    whole = stage(tmp_path / "whole")
    assert _equal(whole, stage(tmp_path / "same"))[0]
    assert not _equal(whole, stage(tmp_path / "other", weight=1.0000001))[0]
    for folder in (one := stage(tmp_path / "one"), two := stage(tmp_path / "two")):
        next(folder.rglob("rank-*")).unlink()
    assert not _equal(one, two)[0]


def test_what_cannot_be_read_does_not_hold(tmp_path):
    claim = _checked("it is listed", _quarantined, tmp_path, set())
    assert not claim.holds
    assert "quarantine.jsonl" in claim.found
