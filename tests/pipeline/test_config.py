import inspect
import tomllib

import pytest

from pipeline.config import ModelSettings, TrainSettings
from pipeline.models import MODELS, create_model
from pipeline.settings import check, dump_toml, override
from pipeline.weights import OF_MASKING
from shards.errors import UserError
from tests.pipeline.minimal import MINIMAL, settings


def test_a_batch_that_the_ranks_do_not_divide_names_those_that_fit():
    with pytest.raises(UserError, match=r"global_batch 8 does not divide over 3 ranks; set it to 6 or 9"):
        settings().accumulation(3)
    with pytest.raises(UserError, match=r"micro_batch 7 .* one of \[1, 2, 4, 5, .*\]"):  # at once
        settings(global_batch=10**12, micro_batch=7).accumulation(1)
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
