"""Masked autoencoding on two ranks under ZeRO, its encoder fine-tuned; probes and patience on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.command import LAUNCH, done, environment, losses, patchmill
from tests.images import build_image_set

CONFIG = """
kind = "mae"
duration = "30 steps"
global_batch = 12
log_every = "1 step"
[data]
train = "set/train"
val = "set/val"
resolution = 32
[model]
name = "vit_ti8"
embed_dim = 24
num_heads = 3
depth = 2
position = "sincos_2d_moco"
[mae]
decoder_depth = 1
decoder_dim = 16
decoder_heads = 2
[optim]
lr = 1e-3
betas = [0.9, 0.95]
clip = 1.0
[engine]
zero_stage = {stage}
[evaluate]
every = "3 steps"
patience = 2
[probe]
train = "set/train"
test = "set/val"
every = "6 steps"
shots = [1, 5]
linear = true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mae")
    build_image_set(folder, per_class=16, split={"val": 0.25}, shard_samples=8)
    return folder


def train(folder: Path, ranks: int, run: str, *over: str, stage: int = 3) -> None:
    (folder / f"{run}.toml").write_text(CONFIG.format(stage=stage))
    command = ["train", f"{run}.toml", *over, "--out", run, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ranks), f"{run}/logs", *command],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    code, stderr = done(process)
    assert code == 0, stderr


@pytest.fixture(scope="module")
def alone(folder) -> list[tuple[int, float]]:
    train(folder, 1, "alone", "duration='12 steps'", stage=0)
    return losses(folder / "alone")


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2)), 3])
def test_losses_are_those_of_one_rank_and_the_encoder_is_fine_tuned(folder, alone, stage):
    run = folder / f"zero-{stage}"
    train(folder, 2, run.name, "duration='12 steps'", stage=stage)
    after = losses(run)
    assert [samples for samples, _ in after] == [samples for samples, _ in alone]
    assert [loss for _, loss in after] == pytest.approx([loss for _, loss in alone], abs=2e-4)
    assert after[-1][1] < after[0][1]
    probed = [(line["samples"], *line.values()) for line in lines(run) if "probe_linear" in line]
    assert [each[0] for each in probed] == [72, 144]
    by_one = [(line["samples"], *line.values()) for line in lines(folder / "alone") if "probe_linear" in line]
    assert probed == [pytest.approx(each, abs=0.1) for each in by_one]  # of these few images one may go either way
    assert {line.keys() - {"samples"} == {"probe_1shot", "probe_5shot", "probe_linear"}
            for line in lines(run) if "probe_linear" in line} == {True}  # fmt: skip

    converted = patchmill("convert", run.name, f"{run.name}.safetensors", cwd=folder)
    assert converted.returncode == 0, converted.stderr
    with safe_open(folder / f"{run.name}.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert not [name for name in names if "decoder" in name or "mask" in name]
    tuned = patchmill(
        "train", f"{run.name}.toml", "kind=finetune", f"init={run.name}.safetensors", "model.position=learned",
        "duration='1 epoch'", "engine.kind=accelerate", "engine.zero_stage=0", "--out", f"{run.name}-tuned", "--json",
        cwd=folder,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    result = json.loads(tuned.stdout)
    assert {"probe_1shot", "probe_5shot", "probe_linear"} <= result.keys()


def test_patience_ends_a_stage_as_finished_and_a_resume_goes_no_further(folder):
    """At a learning rate of almost nothing, no evaluation after the first is better by more than rounding."""
    over = ("optim.lr=1e-30", "engine.kind=accelerate", "engine.zero_stage=0", "checkpoint.every='100 epochs'")
    train(folder, 2, "patient", *over, stage=0)
    run = folder / "patient"
    evaluated = [line["samples"] for line in lines(run) if "val_loss" in line]
    assert evaluated == [36, 72, 108]
    assert (run / "checkpoints" / "best").read_text() == "samples-000000000036\n"
    assert (run / "checkpoints" / "latest").read_text() == "samples-000000000108\n"
    before = (run / "metrics.jsonl").read_bytes()
    again = patchmill("train", "patient.toml", *over, "--out", "patient", "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    result = json.loads(again.stdout)
    assert (result["samples"], result["early"], result["best"]["samples"]) == (108, True, 36)
    assert (run / "metrics.jsonl").read_bytes() == before
    longer = patchmill("train", "patient.toml", *over, "evaluate.patience=4", "--out", "patient", "--json", cwd=folder)
    assert json.loads(longer.stdout)["samples"] == 180, longer.stderr
