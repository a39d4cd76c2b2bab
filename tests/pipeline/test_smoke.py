"""The smoke form of a stage: what shrinks, and that nothing else changes."""

import pytest

from pipeline.config import TrainSettings, check, merge
from pipeline.models import MODELS
from pipeline.recipe import read_recipe, recipe_names
from pipeline.resume import _flat
from pipeline.schedule import Schedule
from pipeline.smoke import shrink, smoke_run
from pipeline.weights import check_model
from shards.errors import UserError

MAY_SHRINK = {
    "model.depth", "model.embed_dim", "model.mlp_dim", "model.backbone", "model.backbone_width", "model.units",
    "model.width", "data.resolution", "data.resize", "global_batch", "micro_batch", "duration", "log_every",
    "checkpoint.every", "evaluate.every", "schedule.warmup", "schedule.milestones",
}  # fmt: skip
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
    before, after = (_flat(each.model_dump(mode="json")) for each in (full, small))
    assert {key for key in before | after if before.get(key) != after.get(key)} <= MAY_SHRINK
    assert (small.duration, small.global_batch) == ("6 steps", 8)
    assert small.data.resolution < full.data.resolution
    if full.model.name:
        check_model(small, name)
    rates = [Schedule.of(small, None, 8).rate(8 * step) for step in range(1, 7)]
    assert rates[1] == max(rates)  # after the warm-up
    assert len(set(rates)) == (6 if small.schedule.shape != "steps" else 2 + len(small.schedule.milestones))


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


@pytest.mark.parametrize("name", [name for name in MODELS if "axial" not in name])
def test_every_model_shrinks(name):
    small = shrink(settings(model={"name": name}))
    check_model(small, name)
    assert small.data.resolution <= 64


@pytest.mark.timeout(240)
def test_the_smoke_form_of_every_recipe_runs(alone, tmp_path):
    """On 2 cores this takes a minute or two; nobody waits for longer than 4."""
    took = {}
    for recipe in map(read_recipe, recipe_names()):
        result = smoke_run(recipe.settings, recipe.about, recipe.name)
        assert (result["steps"], result["samples"]) == (6, 48), recipe.name
        assert result["val"]["images"] == 12
        took[recipe.name] = result["seconds"]
    print(sum(took.values()), max(took.items(), key=lambda each: each[1]))
