"""The smoke form of a stage: what shrinks, and that nothing else changes."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import pipeline.objectives
from pipeline.config import TrainSettings
from pipeline.corruption import MASK, corruption
from pipeline.models import MODELS
from pipeline.objectives.mae import MaskedAutoencoding
from pipeline.objectives.masked_patch import MaskedPatch
from pipeline.objectives.supervised import Supervised
from pipeline.recipe import read_recipe, read_settings, recipe_names
from pipeline.schedule import Schedule
from pipeline.settings import check, flat, merge
from pipeline.smoke import shrink, smoke_run
from pipeline.weights import check_model
from shards.errors import UserError
from tests.processor import HAS_BFLOAT16

MAY_SHRINK = {
    "model.depth", "model.embed_dim", "model.mlp_dim", "model.backbone", "model.backbone_width", "model.units",
    "model.width", "data.resolution", "data.resize", "global_batch", "micro_batch", "duration", "log_every",
    "checkpoint.every", "evaluate.every", "schedule.warmup", "schedule.milestones", "mae.decoder_depth",
    "mae.decoder_dim",
}  # fmt: skip
OBJECTIVES = {"masked_patch": MaskedPatch, "mae": MaskedAutoencoding}
BASE = {
    "duration": "9 epochs", "global_batch": 64, "data": {"train": "a"}, "model": {"name": "vit_b16"},
    "schedule": {"warmup": "3 epochs"},
}  # fmt: skip


def settings(**over) -> TrainSettings:
    return check(TrainSettings, merge(BASE, over), "test")


@pytest.mark.parametrize("name", recipe_names())
def test_only_depth_width_resolution_batch_and_steps_shrink(name):
    recipe = read_recipe(name)
    full = recipe.checked
    weights = None if full.model.name else {"name": recipe.about.model, "image_size": 224}
    small = shrink(full, weights=weights)
    before, after = (flat(each.model_dump(mode="json")) for each in (full, small))
    assert {key for key in before | after if before.get(key) != after.get(key)} <= MAY_SHRINK
    assert (small.duration, small.global_batch) == ("6 steps", 8)
    assert small.data.resolution < full.data.resolution
    if full.model.name:
        check_model(small, name)
    first, *rates = [Schedule.of(small, None, 8).rate(8 * step) for step in range(1, 7)]
    assert first < rates[0]  # the warm-up
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == (1 + len(small.schedule.milestones) if small.schedule.shape == "steps" else 5)


def test_it_stays_away_from_real_runs():
    small = shrink(settings(resume="runs/real", checkpoint={"mirror": "s3://real/run", "minutes": 5}))
    assert (small.resume, small.checkpoint.mirror) == (None, None)


def test_it_runs_on_the_ranks_and_in_the_micro_batches_of_the_stage():
    assert shrink(settings(), ranks=4).global_batch == 32
    assert shrink(settings(global_batch=12), ranks=4).global_batch == 12
    assert shrink(settings()).micro_batch is None
    small = shrink(settings(micro_batch=4), ranks=2)
    assert (small.global_batch, small.micro_batch, small.accumulation(2)) == (16, 4, 2)
    mixed = shrink(settings(data={"augment": "light2"}, global_batch=4), ranks=2)
    assert mixed.accumulation(2) == 1
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        shrink(settings(), ranks=3)
    assert shrink(settings(schedule={"warmup": "0 steps"})).schedule.warmup == "0 steps"


def test_weights_that_are_not_shrunk_keep_their_model():
    full = {"name": "vit_b16", "image_size": 224, "num_classes": 1000}
    tuned = settings(kind="finetune", init="w.safetensors")
    assert shrink(tuned, weights=full).model == tuned.model
    small = {**full, "depth": 2, "embed_dim": 96}
    assert shrink(tuned, weights=small).model.depth == 2
    unnamed = check(
        TrainSettings, {**BASE, "model": {"dropout": 0.1}, "init": "w.safetensors", "kind": "finetune"}, "x"
    )
    assert shrink(unnamed, weights=full).model == unnamed.model
    assert shrink(unnamed, weights=full).data.resolution == 48
    assert shrink(unnamed, weights={**full, "name": "vit_h14"}).data.resolution == 42


@pytest.mark.parametrize("name", MODELS)
def test_every_model_shrinks(name):
    small = shrink(settings(model={"name": name}))
    check_model(small, name)
    assert small.data.resolution <= 64


@pytest.mark.long
@pytest.mark.timeout(240)
def test_the_smoke_form_of_every_recipe_runs(alone, monkeypatch):
    """On 2 quiet cores that takes less than a minute; nobody waits for longer than 4."""
    seen = []

    def create_objective(settings, template, *rest):
        objective = pipeline.objectives.create_objective(settings, template, *rest)
        seen.append((type(objective), type(template)))
        return objective

    monkeypatch.setattr("pipeline.train.create_objective", create_objective)
    threads = torch.get_num_threads()
    for name in ("small_pretrain", "small_finetune"):  # for the imports of both engines
        smoke_run(*read_settings(name), name)
    seen.clear()
    for recipe in map(read_recipe, recipe_names()):
        if recipe.checked.engine.precision == "bfloat16" and not HAS_BFLOAT16:
            continue  # ten times as long there
        began, clock = time.process_time(), time.monotonic()
        result = smoke_run(recipe.settings, recipe.about, recipe.name)
        print(f"{recipe.name}: {time.monotonic() - clock:.1f} s")
        assert time.process_time() - began <= 5, recipe.name  # of a processor, whoever else is at work
        assert (result["steps"], result["samples"]) == (6, 48), recipe.name
        assert result["val"]["images"] == 12
        assert math.isfinite(result["val"]["loss"]), recipe.name
        assert "checkpoint" not in result  # the folder is gone
        objective = OBJECTIVES.get(recipe.checked.kind, Supervised)
        assert seen.pop() == (objective, MODELS[recipe.about.model][0]), recipe.name
    assert not seen
    assert torch.get_num_threads() == threads


def test_masked_patch_prediction_corrupts_in_every_way_in_its_smoke_form():
    recipe = read_recipe("masked_patch_vit_b16_jft300m")
    small, masked = shrink(recipe.checked), recipe.checked.masked_patch
    patches = (small.data.resolution // 16) ** 2
    drawn = corruption(np.arange(8), None, 0, patches, masked.share, masked.mask, masked.other)
    where, source = drawn[..., 0], drawn[..., 1]
    assert ((source == MASK).any(1) & (source == where).any(1) & ((source != MASK) & (source != where)).any(1)).all()


@pytest.mark.long
def test_a_smoke_run_leaves_what_it_is_told_to_and_says_what_is_wrong(alone, tmp_path):
    table, about = read_settings("finetune_pets")
    result = smoke_run(table, about, "finetune_pets", tmp_path / "run")
    assert Path(result["checkpoint"]).is_dir()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[1] == max(rates) == pytest.approx(0.01)  # 2 steps of warm-up, then a cosine
    assert rates[0] == pytest.approx(0.005)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    assert smoke_run(table, about, "finetune_pets", tmp_path / "run")["val"] == result["val"]  # it was done
    with pytest.raises(UserError, match=r"cannot go on from .*; set it back, or start another run in another folder"):
        smoke_run(*read_settings("bit_hyperrule_500"), "bit_hyperrule_500", tmp_path / "run")
    # Weights of its own, of any size, are as good as those that it makes.
    again = smoke_run(table | {"init": str(tmp_path / "run" / "vit_b16.safetensors")}, about, "again")
    assert again["val"] == pytest.approx(result["val"], rel=1e-6)
    with pytest.raises(UserError, match=r"setting data\.train = 3 in here does not fit"):
        smoke_run(merge(table, {"data": {"train": 3}}), about, "here")
    with pytest.raises(UserError, match=r"setting model = 3 in here does not fit"):
        smoke_run(table | {"model": 3}, about, "here")
    with pytest.raises(UserError, match=r"here: unknown model: 'vit_x'"):
        smoke_run({**BASE, "model": {"name": "vit_x"}, "data": {}}, None, "here")
