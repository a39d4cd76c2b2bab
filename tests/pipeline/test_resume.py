from types import SimpleNamespace

import pytest

from pipeline.config import TrainSettings, check, flat, merge
from pipeline.resume import RULES, check_resume
from shards.errors import UserError

BASE = {"duration": "2 epochs", "global_batch": 8, "data": {"train": "a"}, "model": {"name": "vit_b16"}}


def settings(**over) -> TrainSettings:
    return check(TrainSettings, merge(BASE, over), "test")


LOADED = SimpleNamespace(path=SimpleNamespace(name="samples-1"), state={"settings": settings().model_dump(mode="json")})


@pytest.mark.parametrize(
    "over",
    [{"seed": 1}, {"kind": "finetune"}, {"loss": "sigmoid"}, {"model": {"depth": 3}}, {"optim": {"name": "sgd"}},
     {"data": {"resolution": 32}}, {"data": {"augment": "resize"}}, {"data": {"augment": "light1"}},
     {"data": {"scaled_decoding": True}}, {"data": {"exclude": "v1"}}, {"data": {"mixup": 0.5}},
     {"label_smoothing": 0.1}],
)  # fmt: skip
def test_what_would_make_it_another_run_is_refused(over):
    with pytest.raises(UserError, match=r"cannot go on .* changed from .* set it back"):
        check_resume(settings(**over), LOADED)


@pytest.mark.parametrize(
    "over",
    [{"optim": {"lr": 0.5}}, {"duration": "9 epochs"}, {"global_batch": 16}, {"engine": {"zero_stage": 3}},
     {"engine": {"precision": "bfloat16"}}, {"micro_batch": 2}, {"schedule": {"shape": "linear"}}],
)  # fmt: skip
def test_what_is_allowed_is_told(over, capsys):
    check_resume(settings(**over), LOADED)
    assert f"{next(iter(over))}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "over",
    [{"data": {"train": "moved"}}, {"data": {"threads": 7}}, {"data": {"cache": "here", "cache_bytes": "1 GB"}},
     {"data": {"store": {"region": "eu-test-1"}}}, {"log_every": "1 step"}, {"checkpoint": {"keep": 5}},
     {"evaluate": {"view": "center_crop"}}],
)  # fmt: skip
def test_what_is_free_is_silent(over, capsys):
    check_resume(settings(**over), LOADED)
    assert capsys.readouterr().err == ""


def test_the_table_covers_every_setting():
    for key in flat(settings().model_dump(mode="json")):
        assert [rule for rule in RULES if key == rule or key.startswith(f"{rule}.")], key


def test_settings_that_a_checkpoint_is_older_than_have_their_defaults(capsys):
    old = settings().model_dump(mode="json")
    del old["masked_patch"], old["guard"]
    check_resume(settings(), SimpleNamespace(path=LOADED.path, state={"settings": old}))
    assert capsys.readouterr().err == ""
