from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline import checkpoint
from pipeline.checkpointindex import BrokenCheckpointError
from pipeline.config import TrainSettings
from pipeline.resume import RULES, check_resume, last_checkpoint
from pipeline.settings import check, flat, merge
from pipeline.watchdog import Watchdog
from shards.errors import UserError

BASE = {"duration": "2 epochs", "global_batch": 8, "data": {"train": "a"}, "model": {"name": "vit_b16"}}


def settings(**over) -> TrainSettings:
    return check(TrainSettings, merge(BASE, over), "test")


LOADED = SimpleNamespace(path=SimpleNamespace(name="samples-1"), state={"settings": settings().model_dump(mode="json")})


# Of each row of the table: what is changed, and what must be set before for that to mean something.
ROWS = {
    "kind": ({"kind": "finetune"}, {}),
    "seed": ({"seed": 1}, {}),
    "loss": ({"loss": "sigmoid"}, {}),
    "label_smoothing": ({"label_smoothing": 0.1}, {}),
    "masked_patch": ({"masked_patch": {"share": 0.4}}, {"kind": "masked_patch"}),
    "mae": ({"mae": {"share": 0.5}}, {"kind": "mae"}),
    "model": ({"model": {"depth": 3}}, {}),
    "optim.name": ({"optim": {"name": "sgd"}}, {}),
    "data.resolution": ({"data": {"resolution": 32}}, {}),
    "data.augment": ({"data": {"augment": "light1"}}, {}),
    "data.crop_area": ({"data": {"crop_area": [0.1, 1.0]}}, {}),
    "data.scaled_decoding": ({"data": {"scaled_decoding": True}}, {}),
    "data.resize": ({"data": {"resize": 300}}, {"data": {"augment": "resize_crop"}}),
    "data.mixup": ({"data": {"mixup": 0.5}}, {}),
    "data.mirror": ({"data": {"mirror": False}}, {}),
    "data.exclude": ({"data": {"exclude": "v1"}}, {}),
    "data.subset": ({"data": {"subset": 9}}, {}),
    "data.window_bytes": ({"data": {"window_bytes": 10**9}}, {}),
    "data": (
        {"data": {"train": "moved", "threads": 7, "cache": "here", "cache_bytes": "1 GB", "decode": "process"}},
        {},
    ),
    "init": ({"init": "weights.safetensors"}, {}),
    "resume": ({"resume": "another"}, {}),
    "log_every": ({"log_every": "1 step"}, {}),
    "checkpoint": ({"checkpoint": {"keep": 5, "minutes": 3, "mirror": "s3://x", "asynchronous": False}}, {}),
    "evaluate": ({"evaluate": {"view": "center_crop"}}, {}),
    "probe": ({"probe": {"train": "a", "test": "b"}}, {}),
    "watchdog": ({"watchdog": 5.0}, {}),
    "track": ({"track": {"wandb": "project"}}, {}),
    "profile": ({"profile": {"steps": 3}}, {}),
    "guard": ({"guard": {"sigmas": 5.0}}, {}),
    "duration": ({"duration": "9 epochs"}, {}),
    "global_batch": ({"global_batch": 16}, {}),
    "micro_batch": ({"micro_batch": 2}, {}),
    "optim": ({"optim": {"lr": 0.5}}, {}),
    "schedule": ({"schedule": {"shape": "linear"}}, {}),
    "engine": ({"engine": {"zero_stage": 3}}, {}),
}


@pytest.mark.parametrize("row", RULES)
def test_each_row_of_the_table(row, capsys):
    over, base = ROWS[row]
    before, now = settings(**base), settings(**merge(base, over))
    loaded = SimpleNamespace(path=LOADED.path, state={"settings": before.model_dump(mode="json")})
    check_resume(before, loaded)
    assert capsys.readouterr().err == ""
    changed = flat(over)
    assert all(key == row or key.startswith(f"{row}.") for key in changed)
    if RULES[row] == "refused":
        with pytest.raises(UserError, match=rf"cannot go on .* {next(iter(changed))} changed from .* set it back"):
            check_resume(now, loaded)
        return
    check_resume(now, loaded)
    told = capsys.readouterr().err
    if RULES[row] == "free":
        assert told == ""
    else:
        assert all(f"going on from samples-1 with {key} changed from" in told for key in changed)


def test_the_table_covers_every_setting():
    for key in flat(settings().model_dump(mode="json")):
        assert [rule for rule in RULES if key == rule or key.startswith(f"{rule}.")], key


def test_settings_that_a_checkpoint_is_older_than_have_their_defaults(capsys):
    old = settings().model_dump(mode="json")
    del old["masked_patch"], old["guard"]
    check_resume(settings(), SimpleNamespace(path=LOADED.path, state={"settings": old}))
    assert capsys.readouterr().err == ""


def test_a_checkpoint_that_does_not_say_its_settings_is_broken():
    with pytest.raises(BrokenCheckpointError, match="samples-1 does not say which settings it was written with; use"):
        check_resume(settings(), SimpleNamespace(path=Path("samples-1"), state={}))


def test_a_kill_while_the_only_checkpoint_is_replaced_loses_nothing(tmp_path, alone):
    folder, state = tmp_path / "checkpoints", {"settings": settings().model_dump(mode="json")}
    path = checkpoint.save(folder, 8, [("weight", "a", 0, torch.ones(1))], {"a": (1,)}, state)
    path.rename(folder / f".{path.name}.replaced.partial")  # as the kill leaves it
    with Watchdog(tmp_path / "logs", 60.0, 0, list) as watch:
        assert last_checkpoint(settings(), tmp_path, watch).path == path
