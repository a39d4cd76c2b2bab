"""Every kind of pre-training on two ranks under ZeRO, its encoder fine-tuned; probes and patience on the way."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.command import LAUNCH, done, environment, losses, patchmill
from tests.images import build_image_set

CONFIG = """
kind = "{kind}"
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
[optim]
lr = 1e-3
betas = [0.9, 0.95]
clip = 1.0
[engine]
zero_stage = {stage}
[evaluate]
every = "3 steps"
[probe]
train = "set/train"
test = "set/val"
every = "6 steps"
shots = [1, 5]
linear = true
"""
TABLES = {"mae": "[mae]\ndecoder_depth = 1\ndecoder_dim = 16\ndecoder_heads = 2\n"}


def kinds_and_stages(*long: tuple[str, int]) -> pytest.MarkDecorator:
    """Parametrise with every kind and ZeRO stage; all are slow but those that are ``long``."""
    every = product(("supervised", "masked_patch", "mae"), range(4))
    return pytest.mark.parametrize(
        ("kind", "stage"),
        [pytest.param(*each, marks=pytest.mark.long if each in long else pytest.mark.slow) for each in every],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mae")
    build_image_set(folder, per_class=16, split={"val": 0.25}, shard_samples=8)
    return folder


def write_settings(folder: Path, run: str, kind: str, stage: int = 0) -> None:
    (folder / f"{run}.toml").write_text(CONFIG.format(kind=kind, stage=stage) + TABLES.get(kind, ""))


def train(folder: Path, ranks: int, run: str, *over: str, kind: str = "mae", stage: int = 0) -> None:
    write_settings(folder, run, kind, stage)
    command = ["train", f"{run}.toml", *over, "--out", run, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(ranks), f"{run}/logs", *command],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    code, stderr = done(process)
    assert code == 0, stderr


@pytest.fixture(scope="module")
def run(folder) -> Callable[..., Path]:
    """A run of a kind of training, on one rank without ZeRO or on two under a stage; made when it is asked for."""

    @cache
    def made(kind: str, ranks: int = 1, stage: int = 0) -> Path:
        out = folder / f"{kind}-{ranks}-zero-{stage}"
        train(folder, ranks, out.name, "duration='12 steps'", kind=kind, stage=stage)
        return out

    return made


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@kinds_and_stages(("mae", 3), ("masked_patch", 3))
def test_losses_and_probes_are_those_of_one_rank(run, kind, stage):
    one, two = run(kind), run(kind, 2, stage)
    before, after = losses(one), losses(two)
    assert [samples for samples, _ in after] == [samples for samples, _ in before]
    assert [loss for _, loss in after] == pytest.approx([loss for _, loss in before], abs=2e-4)
    assert after[-1][1] < after[0][1]
    probed = [(line["samples"], *line.values()) for line in lines(two) if "probe_linear" in line]
    assert [each[0] for each in probed] == [72, 144]
    by_one = [(line["samples"], *line.values()) for line in lines(one) if "probe_linear" in line]
    assert probed == [pytest.approx(each, abs=0.1) for each in by_one]  # of these few images one may go either way
    assert {line.keys() - {"samples"} == {"probe_1shot", "probe_5shot", "probe_linear"}
            for line in lines(two) if "probe_linear" in line} == {True}  # fmt: skip


@kinds_and_stages(("mae", 3))
def test_the_encoder_is_fine_tuned(folder, run, kind, stage):
    name = run(kind, 2, stage).name
    converted = patchmill("convert", name, f"{name}.safetensors", cwd=folder)
    assert converted.returncode == 0, converted.stderr
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert not [each for each in names if "decoder" in each or (kind == "mae" and "mask" in each)]
    write_settings(folder, f"{name}-tuned", "finetune")
    tuned = patchmill(
        "train", f"{name}-tuned.toml", f"init={name}.safetensors", "model.position=learned",
        "duration='1 epoch'", "engine.kind=accelerate", "--out", f"{name}-tuned", "--json",
        cwd=folder,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    result = json.loads(tuned.stdout)
    assert {"probe_1shot", "probe_5shot", "probe_linear"} <= result.keys()


@pytest.mark.long
def test_patience_ends_a_stage_as_finished_and_a_resume_goes_no_further(folder):
    """At a learning rate of almost nothing, no evaluation after the first is better by more than rounding."""
    over = ("optim.lr=1e-30", "engine.kind=accelerate", "checkpoint.every='100 epochs'", "evaluate.patience=2")
    train(folder, 2, "patient", *over)
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
