"""The configuration that is made for DeepSpeed, and what is refused before an engine is."""

import subprocess
import sys

import pytest
import torch

from pipeline.config import TrainSettings
from pipeline.engines import create_engine, room
from pipeline.engines.configuration import BUCKET, deepspeed_config
from pipeline.models import create_model
from pipeline.settings import check, merge
from shards.errors import UserError
from tests.command import environment

BASE = {"duration": "1 epoch", "global_batch": 24, "micro_batch": 2, "data": {"train": "-"}, "model": {"name": "a"}}


def settings(**over) -> TrainSettings:
    return check(TrainSettings, merge(BASE, over), "test")


def test_buckets_are_no_larger_than_the_model_and_than_a_network_needs():
    zero = deepspeed_config(settings(), 4, [1000, 1], False)["zero_optimization"]
    assert zero == {"stage": 1, "reduce_bucket_size": 1002, "allgather_bucket_size": 1002}
    zero = deepspeed_config(settings(engine={"zero_stage": 3}), 4, [632_045_800], False)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == BUCKET
    assert zero["stage3_max_live_parameters"] < 632_045_800 / 8  # never all of ViT-H/14


def test_any_key_is_laid_over_what_is_made():
    over = {"zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 7}, "aio": {"queue_depth": 3}}
    config = deepspeed_config(settings(engine={"deepspeed": over}, optim={"clip": 2.0}), 4, [10**6], False)
    assert config["aio"] == {"queue_depth": 3}
    assert config["gradient_clipping"] == 2.0
    assert config["zero_optimization"] == {
        "stage": 1, "reduce_bucket_size": 7, "allgather_bucket_size": 10**6, "overlap_comm": False,
    }  # fmt: skip
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 3)


@pytest.mark.parametrize(
    ("over", "words"),
    [
        (
            {"zero_optimization": {"reduce_bucket_sise": 5}},
            r"engine\.deepspeed\.zero_optimization\.reduce_bucket_sise = 5 .*did you mean 'reduce_bucket_size'",
        ),
        (
            {"zero_optimization": {"reduce_bucket_size": "abc"}},
            r"engine\.deepspeed\.zero_optimization\.reduce_bucket_size = 'abc' .*should be a valid integer",
        ),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r"reduce_bucket_size = \"auto\" is for a trainer"),
        ({"bogus": 1}, r"engine\.deepspeed\.bogus = 1 is not DeepSpeed's; mend it"),
        ({"wall_clock_brakedown": True}, r"wall_clock_brakedown = True .*did you mean 'wall_clock_breakdown'"),
        ({"wall_clock_breakdown": "often"}, "DeepSpeed does not take engine.deepspeed: TypeError"),
        ({"amp": {"enabled": True}}, "DeepSpeed does not take engine.deepspeed: .*removed"),
    ],
)
def test_what_deepspeed_would_die_of_or_ignore_is_refused(over, words):
    with pytest.raises(UserError, match=words) as raised:
        deepspeed_config(settings(engine={"deepspeed": over}), 4, [10**6], False)
    assert "\n" not in str(raised.value)


def test_a_check_changes_nothing():
    over = {"compile": {"deepcompile": False}, "flops_profiler": {"enabled": True}, "tensorboard": {"enabled": False}}
    config = deepspeed_config(settings(engine={"deepspeed": over}), 4, [10**6], False)
    assert type(config) is dict
    assert {key: config[key] for key in over} == over


def test_gradients_add_up_in_float32_under_every_precision():
    for precision in ("float32", "bfloat16", "float16"):
        config = deepspeed_config(settings(engine={"precision": precision}), 1, [10], False)
        assert config["data_types"] == {"grad_accum_dtype": "fp32"}
        assert config["communication_data_type"] == "fp32"
        assert config.get("torch_autocast", {}).get("lower_precision_safe_modules", []) == []
        assert "bf16" not in config  # would start the masters from rounded weights
        assert "fp16" not in config


def test_offloaded_memory_is_pinned_for_a_gpu_alone(tmp_path):
    engine = {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": str(tmp_path)}
    zero = deepspeed_config(settings(engine=engine), 1, [10], True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert zero["offload_param"] | {"buffer_count": 1} == {
        "device": "nvme", "nvme_path": str(tmp_path), "pin_memory": True, "max_in_cpu": 0, "buffer_count": 1,
        "buffer_size": 10,
    }  # fmt: skip
    assert not deepspeed_config(settings(engine=engine), 1, [10], False)["zero_optimization"]["offload_param"][
        "pin_memory"
    ]


def refused(checked: TrainSettings, words: str, model: str = "vit_ti16") -> None:
    with pytest.raises(UserError, match=words) as raised:
        create_engine(lambda: create_model(model, seed=None), lambda name, shape: torch.zeros(shape), checked)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="float16 runs there")
def test_float16_without_a_gpu_is_refused(alone):
    refused(settings(engine={"precision": "float16"}), 'precision "float16" is of GPUs, and there is none; set it to')


def test_a_model_without_blocks_has_none_to_recompute(alone):
    class Plain(torch.nn.Linear):
        pass

    for key in ("recompute_every", "compile"):
        with pytest.raises(UserError, match=rf"engine\.{key} is of blocks, and Plain has none; unset it"):
            create_engine(lambda: Plain(2, 2), lambda name, shape: torch.zeros(shape), settings(engine={key: 1}))


def test_compiling_without_a_compiler_is_refused(alone, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    words = r"engine\.compile wants the C\+\+ compiler no-such-compiler, and it is not here; install it"
    refused(settings(engine={"compile": True}), words)


def test_offload_without_room_is_found_before_the_start(alone, monkeypatch, tmp_path):
    # ViT-Ti/16 by five values of four bytes: master, two states, gradient, a copy to move; and the largest parameter
    # once more, and AdamW's count.
    wanted = 4 * (5 * 5_717_416 + 192_000 + 1)
    monkeypatch.setattr(room, "free_memory", lambda: wanted - 1.0)
    refused(
        settings(engine={"offload_optimizer": "cpu"}),
        r"offloading wants 0\.1 GB of this machine's memory, and 0\.1 GB are free; offload to a folder on NVMe",
    )
    monkeypatch.setattr(room, "free_memory", lambda: 1e12)
    monkeypatch.setattr(room, "check_nvme", lambda folder: None)
    monkeypatch.setattr(room, "check_alone", lambda settings: None)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 5_717_416 * 4.0 - 1}))
    refused(
        settings(engine={"zero_stage": 3, "offload_parameters": str(tmp_path)}),
        rf"offloading wants 0\.0 GB in {tmp_path}, and 0\.0 GB are free; make room",
    )


def test_a_folder_that_cannot_be_written_and_a_machine_without_libaio_are_refused(alone, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    engine = {"zero_stage": 3, "offload_optimizer": str(tmp_path / "file")}
    refused(settings(engine=engine), f"cannot offload to {tmp_path}/file: .* give a folder on NVMe")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    engine["offload_optimizer"] = str(tmp_path / "nvme")
    refused(settings(engine=engine), "wants DeepSpeed's async_io, .* install it .*libaio-dev")


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_one_rank_on_a_cpu_does_not_read_parameters_from_nvme(alone, tmp_path):
    engine = {"zero_stage": 3, "offload_parameters": str(tmp_path)}
    refused(settings(engine=engine), "is wrong in DeepSpeed for one rank on a CPU; take two ranks, or set it to")


def test_deepspeed_logs_to_stderr_and_who_listens_besides_goes_on_listening():
    code = """
import deepspeed, io, logging, sys
class Listener(logging.StreamHandler):
    pass
listener = Listener(heard := io.StringIO())
deepspeed.utils.logger.addHandler(listener)
import pipeline.engines.deepspeed
deepspeed.utils.logger.warning("it says something")
assert heard.getvalue() == "it says something\\n"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert "it says something" in done.stderr
    assert "it says something" not in done.stdout
