import tomllib

import pytest

from pipeline.config import TrainSettings
from pipeline.settings import Duration, check, dump_toml, override, read_toml
from shards.errors import UserError
from tests.pipeline.minimal import MINIMAL, MIXED, settings


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("90 epochs", 90_000),
        ("1 epoch", 1_000),
        ("1.5 epochs", 1_500),
        ("10_000 steps", 80_000),
        ("300_000 samples", 300_000),
    ],
)
def test_durations_count_samples(text, samples):
    assert Duration(text).samples(epoch=1_000, global_batch=8) == samples


@pytest.mark.parametrize("text", ["90", "epochs", "-1 epochs", "3 days", "", "0 epochs", "0.0 steps"])
def test_a_duration_without_sense_is_refused(text):
    with pytest.raises(UserError, match="duration"):
        settings(duration=text)
    with pytest.raises(UserError, match=r"checkpoint\.every"):
        settings(checkpoint={"every": text})


def test_an_unknown_setting_names_the_nearest_and_the_known_ones():
    with pytest.raises(UserError) as raised:
        settings(optim={"weigth_decay": 0.1})
    assert "unknown setting optim.weigth_decay in here.toml (did you mean 'weight_decay'?)" in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"unknown setting gobal_batch .*did you mean 'global_batch'"):
        settings(gobal_batch=3)


def test_a_wrong_value_names_key_and_value():
    with pytest.raises(UserError, match=r"engine\.zero_stage = 4 in here\.toml does not fit"):
        settings(engine={"zero_stage": 4})
    with pytest.raises(UserError, match=r"setting data\.train is missing"):
        check(TrainSettings, {**MINIMAL, "data": {}}, "here.toml")
    with pytest.raises(UserError, match=r"^settings in here\.toml do not fit each other: model\.name is not set"):
        check(TrainSettings, {**MINIMAL, "model": {}}, "here.toml")


def test_overrides_are_toml_values_and_bare_words():
    table = override({"optim": {"lr": 1, "clip": 2}}, ["optim.lr=1e-3", "data.train=a/b", "betas=[0.9, 0.95]"])
    assert table == {"optim": {"lr": 1e-3, "clip": 2}, "data": {"train": "a/b"}, "betas": [0.9, 0.95]}
    with pytest.raises(UserError, match="is not a setting"):
        override({}, ["optim.lr"])


def test_settings_survive_their_own_toml():
    first = settings(optim={"lr": 1e-05, "clip": 1.0}, data={"train": 'a "quoted" pfad/ü'})
    for each in (first, settings(data={"train": [{**MIXED[1], "url": 'a "b" = {c}'}, MIXED[0]]})):
        table = tomllib.loads(dump_toml(each.model_dump(mode="json")))
        assert check(TrainSettings, table, "dumped") == each


def test_broken_toml_and_missing_files_are_one_line(tmp_path):
    (tmp_path / "x.toml").write_text("a = [1")
    with pytest.raises(UserError, match="not valid TOML"):
        read_toml(tmp_path / "x.toml")
    with pytest.raises(UserError, match="no settings file"):
        read_toml(tmp_path / "y.toml")
    (tmp_path / "z.toml").mkdir()
    with pytest.raises(UserError, match=r"z\.toml is a folder; give the path of a TOML file"):
        read_toml(tmp_path / "z.toml")


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 3000,
        "x = " + "[" * 200 + "]" * 200,
        "x = " + "{a = " * 3000,
        "x = " + "{a = [" * 60 + "]}" * 60,
        "x" + ".a" * 3000 + " = 1",
        "[x" + ".a" * 3000 + "]",
        "[[x" + ".a" * 3000 + "]]",
    ],
)
def test_what_is_nested_deeper_than_any_setting_is_one_line(tmp_path, text):
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(UserError, match=r"deep\.toml is not valid TOML: .* nested deeper than 100 levels"):
        read_toml(tmp_path / "deep.toml")


def test_an_override_of_more_parts_than_any_setting_is_one_line():
    told = r"setting engine\.deepspeed(\.a){12}\.\.\. is of more than 100 parts"
    with pytest.raises(UserError, match=told):
        override({}, ["engine.deepspeed" + ".a" * 3000 + "=1"])
    assert override({}, ["x=" + "[" * 3000]) == {"x": "[" * 3000}  # no TOML, so a word
