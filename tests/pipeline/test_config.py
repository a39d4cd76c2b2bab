import inspect
import tomllib

import pytest

from pipeline.config import Duration, ModelSettings, TrainSettings, check, dump_toml, merge, override, read_toml
from pipeline.models import MODELS, create_model
from pipeline.weights import OF_MASKING
from shards.errors import UserError

MINIMAL = {"duration": "2 epochs", "global_batch": 8, "data": {"train": "somewhere"}, "model": {"name": "vit_b16"}}


def settings(**over) -> TrainSettings:
    return check(TrainSettings, merge(MINIMAL, over), "here.toml")


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


MIXED = [{"url": "a", "weight": 3}, {"url": "b", "weight": 1, "exclude": "v1"}]


def test_training_data_is_one_set_or_several_with_weights():
    assert [source.url for source in settings().data.sources] == ["somewhere"]
    assert [source.exclude for source in settings(data={"exclude": "v2"}).data.sources] == ["v2"]
    mixed = settings(data={"train": MIXED})
    assert [(s.url, s.weight, s.exclude) for s in mixed.data.sources] == [("a", 3, None), ("b", 1, "v1")]
    text = ["data.train=[{url='a', weight=3}, {url='b', weight=1, exclude='v1'}]"]
    assert check(TrainSettings, override(MINIMAL, text), "here.toml") == mixed
    assert (
        check(TrainSettings, override(merge(MINIMAL, {"data": {"train": MIXED}}), ["data.train=c"]), "x").data.train
        == "c"
    )


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": []}, r"data\.train = \[\] .*give the URL of a data set, or \[\[data\.train\]\] tables"),
        ({"train": ["a", "b"]}, r"data\.train = \['a', 'b'\] .*tables with the url and weight of each"),
        ({"train": {"url": "a"}}, r"data\.train in .*tables with the url"),
        ({"train": [*MIXED, {"url": "c"}]}, r"data\.train\.2\.weight is missing"),
        (
            {"train": [{"url": "c", "weihgt": 2}]},
            r"unknown setting data\.train\.0\.weihgt .*did you mean 'weight'.*: url, ",
        ),
        ({"train": [{"url": "c", "weight": 0}]}, r"data\.train\.0\.weight = 0 "),
        ({"train": MIXED, "exclude": "v1"}, "train lists several; set exclude in their tables"),
    ],
)
def test_a_mixture_that_makes_no_sense_is_refused(data, words):
    with pytest.raises(UserError, match=words) as raised:
        settings(data=data)
    assert "\n" not in str(raised.value)


def test_scaled_decoding_is_for_crops():
    assert settings(data={"augment": "light1", "scaled_decoding": True}).data.scaled_decoding
    with pytest.raises(UserError, match="scaled_decoding is for crops, and augment 'resize' takes the whole image"):
        settings(data={"augment": "resize", "scaled_decoding": True})


def test_a_cache_has_a_size_as_people_write_it():
    for text, size in [("200 GB", 200 * 10**9), ("1.5TB", 1500 * 10**9), ("8GiB", 8 << 30), (5000, 5000)]:
        data = settings(data={"cache": "here", "cache_bytes": text}).data
        assert data.cache_bytes == size
        assert tomllib.loads(dump_toml(data.model_dump(mode="json")))["cache_bytes"] == size
    for wrong in ({"cache": "here"}, {"cache_bytes": "1 GB"}):
        with pytest.raises(UserError, match="cache and cache_bytes go together"):
            settings(data=wrong)
    for text in ("much", "3 apples", "0 GB", "-1 GB"):
        with pytest.raises(UserError, match=r"data\.cache_bytes = "):
            settings(data={"cache": "here", "cache_bytes": text})


def test_overrides_are_toml_values_and_bare_words():
    table = override({"optim": {"lr": 1, "clip": 2}}, ["optim.lr=1e-3", "data.train=a/b", "betas=[0.9, 0.95]"])
    assert table == {"optim": {"lr": 1e-3, "clip": 2}, "data": {"train": "a/b"}, "betas": [0.9, 0.95]}
    with pytest.raises(UserError, match="is not a setting"):
        override({}, ["optim.lr"])


def test_a_batch_that_the_ranks_do_not_divide_names_those_that_fit():
    with pytest.raises(UserError, match=r"global_batch 8 does not divide over 3 ranks; set it to 6 or 9"):
        settings().accumulation(3)
    with pytest.raises(UserError, match=r"micro_batch 3 does not divide the 4 samples .* one of \[1, 2, 4\]"):
        settings(micro_batch=3).accumulation(2)
    with pytest.raises(UserError, match=r"global_batch 8 over 8 ranks gives a rank 1, .* set it to 16"):
        settings(data={"augment": "light2"}).accumulation(8)
    with pytest.raises(UserError, match=r"global_batch 24 over 8 ranks gives a rank 3, .* set it to 16 or 32"):
        settings(global_batch=24, data={"augment": "light2"}).accumulation(8)
    assert settings(data={"augment": "light2"}).accumulation(4) == 1
    assert settings(data={"augment": "light1"}).accumulation(8) == 1  # has no mixup
    assert settings(micro_batch=2).accumulation(2) == 2
    assert settings().accumulation(4) == 1


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


def test_how_stores_are_reached_is_a_table_of_its_own(monkeypatch):
    base = {"duration": "1 epoch", "global_batch": 8, "model": {"name": "vit_b16"}}
    monkeypatch.setenv("PATCHMILL_STORE_REGION", "eu-test-1")
    monkeypatch.setenv("PATCHMILL_STORE_TIMEOUT_SECONDS", "7")
    settings = check(TrainSettings, {**base, "data": {"train": "a", "store": {"timeout_seconds": 9}}}, "c.toml")
    assert (settings.data.store.region, settings.data.store.timeout_seconds) == ("eu-test-1", 9)
    again = check(TrainSettings, tomllib.loads(dump_toml(settings.model_dump(mode="json"))), "resolved.toml")
    assert again == settings
    for table, message in [
        ({"endpiont": "x"}, r"unknown setting data\.store\.endpiont .*did you mean 'endpoint'"),
        ({"endpoint": "x"}, r"setting data\.store\.endpoint = 'x' in c\.toml does not fit: give the URL"),
        ({"concurrency": 0}, r"setting data\.store\.concurrency = 0 in c\.toml does not fit"),
    ]:
        with pytest.raises(UserError, match=message):
            check(TrainSettings, {**base, "data": {"train": "a", "store": table}}, "c.toml")
    for url, what in [("https://me:hunter2@h/x", "password"), ("https://h/x?sig=hunter2", "user or a query")]:
        message = rf"^the URL of h carries a {what}; put secrets into the environment"
        for data in (
            {"train": url},
            {"train": [{"url": url, "weight": 1}]},
            {"train": "a", "store": {"endpoint": url}},
        ):
            with pytest.raises(UserError, match=message):
                check(TrainSettings, {**base, "data": data}, "c.toml")
    monkeypatch.setenv("PATCHMILL_STORE_TIMEOUT_SECONDS", "soon")
    with pytest.raises(UserError, match="environment variable PATCHMILL_STORE_TIMEOUT_SECONDS=soon does not fit"):
        check(TrainSettings, {**base, "data": {"train": "a"}}, "c.toml")


def test_every_setting_of_a_model_is_one_of_a_run():
    models = {model for model, _ in MODELS.values()}
    theirs = {key for model in models for key in inspect.signature(model).parameters}
    assert set(ModelSettings.model_fields) - {"name"} == theirs - {"image_size", "num_classes"} - OF_MASKING


def test_settings_of_a_model_come_from_toml():
    text = """
    name = "vit_s16"
    depth = 1
    pooling = "mean"
    position = "sincos_2d"
    representation = true
    registers = 1
    qkv_bias = false
    drop_path = 0.1
    head_bias = "log_prior"
    """
    chosen = settings(model=tomllib.loads(text)).model
    model = create_model(chosen.name, **chosen.overrides(), seed=None)
    assert (model.pooling, model.position, model.registers, model.drop_path) == ("mean", "sincos_2d", 1, 0.1)
    assert settings(model={"head_bias": -10}).model.head_bias == -10.0
    with pytest.raises(UserError, match=r"model\.pooling = 'gap' in here\.toml does not fit: .*'cls', 'mean'"):
        settings(model={"pooling": "gap"})


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            {"kind": "accelerate", "zero_stage": 2},
            r'kind "accelerate" has no zero_stage 2; unset it, or set kind = "de',
        ),
        ({"kind": "accelerate", "offload_optimizer": "cpu"}, 'kind "accelerate" has no offload_optimizer; unset it'),
        ({"kind": "accelerate", "deepspeed": {"aio": {}}}, 'kind "accelerate" has no deepspeed; unset it'),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer is of zero_stage 1, 2 and 3, .* is 0; set"),
        ({"zero_stage": 2, "offload_optimizer": "/nvme"}, r"to a folder \('/nvme'\) is of zero_stage 3, .* is 2; set"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "offload_parameters is of zero_stage 3, .* is 2; set it to 3"),
        (
            {"deepspeed": {"fp16": {"enabled": True}}},
            "fp16 of DeepSpeed follows our setting engine.precision; set that",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            "stage of DeepSpeed follows our setting engine.zero_stage",
        ),
        (
            {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}},
            r"\.offload_optimizer of DeepSpeed follows our setting engine\.offload_optimizer; set that",
        ),
        (
            {"zero_stage": 3, "deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            r"\.offload_param of DeepSpeed follows our setting engine\.offload_parameters; set that",
        ),
        (
            {"deepspeed": {"zero_optimization": {"cpu_offload": True}}},
            r"cpu_offload of DeepSpeed follows our setting engine\.offload_optimizer",
        ),
        ({"recompute_every": -1}, r"engine\.recompute_every = -1 .* does not fit"),
    ],
)
def test_impossible_settings_of_an_engine_are_refused_with_the_remedy(engine, words):
    with pytest.raises(UserError, match=words) as raised:
        settings(engine=engine)
    assert "\n" not in str(raised.value)


def test_accelerate_has_no_zero_stage_and_keeps_none_when_read_again():
    found = settings(engine={"kind": "accelerate"})
    assert found.engine.zero_stage == 0
    assert check(TrainSettings, tomllib.loads(dump_toml(found.model_dump(mode="json"))), "again") == found


def test_a_key_of_deepspeed_is_set_from_the_command_line():
    table = override(MINIMAL, ["engine.deepspeed.zero_optimization.reduce_bucket_size=5"])
    assert check(TrainSettings, table, "x").engine.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5}}


def test_an_average_that_is_not_kept_cannot_be_evaluated():
    averaged = {"optim": {"ema": 0.9999}, "evaluate": {"ema": True}}
    assert settings(**averaged, data={"val": "a"}).evaluate.ema
    with pytest.raises(UserError, match=r"evaluate\.ema is of evaluations, and there is no data\.val; set it, or"):
        settings(**averaged)
    with pytest.raises(UserError, match=r"evaluate\.ema wants an average .* set optim\.ema"):
        settings(evaluate={"ema": True})


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (
            {"kind": "supervised", "masked_patch": {"share": 0.15}},
            r"masked_patch\.share = 0\.15, and kind 'supervised' would ignore it; unset it, or set kind = 'masked_p",
        ),
        ({"kind": "mae", "masked_patch": {"counts": "drawn"}}, "masked_patch.counts = 'drawn', and kind 'mae' would"),
        ({"kind": "finetune", "init": "a", "mae": {"decoder_depth": 1}}, "mae.decoder_depth = 1, and kind 'finetune'"),
        ({"kind": "masked_patch", "mae": {"share": 0.5}}, "mae.share = 0.5, and kind 'masked_patch' would ignore it"),
        (
            {"kind": "masked_patch", "model": {"head_bias": -10}},
            r"model\.head_bias = -10.* kind 'masked_patch' has none",
        ),
        (
            {"kind": "mae", "model": {"head_bias": "log_prior"}},
            r"model\.head_bias = 'log_prior' .* kind 'mae' has none",
        ),
    ],
)
def test_what_a_kind_would_ignore_is_refused(over, words):
    with pytest.raises(UserError, match=words) as raised:
        settings(**over)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["supervised", "masked_patch", "mae", "finetune"])
def test_settings_of_every_kind_are_read_again(kind):
    own = {kind: {"share": 0.25}} if kind in ("masked_patch", "mae") else {}
    found = settings(kind=kind, init="a", **own)
    assert check(TrainSettings, tomllib.loads(dump_toml(found.model_dump(mode="json"))), "again") == found
