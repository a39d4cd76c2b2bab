import json
import shutil

import pytest

from pipeline.report.expected import compared
from pipeline.report.lineage import ancestors, lineage, parent
from pipeline.report.run import read_run
from shards.build import build
from tests.pipeline.report.made import ended, made_run, trained
from tests.shards.sources.test_imagenet import TRUTH, write_devkit, write_val

KINDS = ("ReaL", "ImageNet v2")

PLAN = """
[[stage]]
name = "big"
kind = "supervised"
recipe = "vit_b16_imagenet21k"

[[stage]]
name = "weights"
kind = "convert"
set = { source = "{big}" }

[[stage]]
name = "rates"
kind = "finetune"
recipe = "finetune_cifar10"
init = "weights"
sweep = "recipe"

[[stage]]
name = "cifar"
kind = "finetune"
recipe = "finetune_cifar10"
init = "weights"
best = "rates"
sweep = { seed = [0, 1] }

[[stage]]
name = "alone"
kind = "finetune"
recipe = "finetune_cifar10"

[[stage]]
name = "scores"
kind = "evaluate"
set = { weights = "{alone}", data = "there" }
"""


@pytest.fixture
def run(tmp_path):
    folder = made_run(tmp_path / "a", PLAN)
    trained(folder, "big", "vit_b16_imagenet21k", 0.4)
    weights = folder / "stages" / "weights" / "model.safetensors"
    ended(folder, "weights", "convert", {"weights": str(weights), "parameters": 86567656})
    for rate, top1 in enumerate((0.90, 0.93)):  # on the dev split
        trained(folder, f"rates-{rate}", "finetune_cifar10", top1, init=str(weights))
    for seed, top1 in enumerate((0.98, 0.99)):
        trained(folder, f"cifar-{seed}", "finetune_cifar10", top1, init=str(weights), seed=seed)
    trained(folder, "alone", "finetune_cifar10", 0.6, init=None, duration="5 steps", optim={"lr": 0.03})
    ended(folder, "scores", "evaluate", {"top1": 0.6, "top5": 0.9, "images": 10})
    return read_run(folder)


def rows_of(run, stage, source="ViT paper, Table 5"):
    return {row.what: row for row in compared(run) if row.stage == stage and row.source == source}


def test_fine_tuning_is_beside_the_number_of_its_weights_recipe_and_seeds_are_a_mean(run):
    found = rows_of(run, "cifar")
    (row,) = found.values()
    assert row.what == "top-1 on CIFAR-10, by the weights it starts from: vit_b16_imagenet21k"
    assert row.expected == (98.95, 98.95)  # vit-paper 6, Table 5
    assert row.ours == pytest.approx(98.5)
    assert row.changed == ()


def test_pre_training_is_beside_what_came_of_it_on_each_data_set(run):
    found = rows_of(run, "big")
    values = {what.rpartition(": ")[2]: (row.expected[0], row.ours) for what, row in found.items()}
    assert values == {
        "ImageNet": (83.97, None), "ReaL": (88.35, None), "CIFAR-10": (98.95, pytest.approx(98.5)),
        "CIFAR-100": (91.67, None), "Pets": (94.43, None), "Flowers": (99.38, None),
    }  # fmt: skip


def test_what_only_chose_settings_is_beside_nothing_be_there_a_run_with_them_or_not(run):
    assert not rows_of(run, "rates")
    for seed in (0, 1):
        shutil.rmtree(run.folder / "stages" / f"cifar-{seed}")
    found = read_run(run.folder)
    assert not rows_of(found, "rates")
    assert rows_of(found, "big")["top-1 after fine-tuning at 384 px: CIFAR-10"].ours is None


def test_weights_of_no_recipe_have_the_range_and_what_was_changed_is_said(run):
    (row,) = rows_of(run, "alone").values()
    assert row.what.endswith(", over all of its weights")
    assert row.expected == (97.77, 99.27)
    assert row.ours == pytest.approx(60)
    # Its rate is one of the recipe's sweep: that is no change.
    assert row.changed == ("duration = 5 steps (recipe: 10_000 steps)", "from nothing (recipe: from weights)")


@pytest.mark.parametrize(
    ("recipe", "over", "expected"),
    [
        ("simple_vit_s16_imagenet", {}, [("top-1, by epochs: 90 epochs", 76.5, 70.0)]),
        ("simple_vit_s16_imagenet", {"duration": "300 epochs"}, [("top-1, by epochs: 300 epochs", 80.0, 70.0)]),
        ("augreg_imagenet", {}, [("top-1 of ViT-B/16 at 224 px, about: ImageNet", 79, 70.0)]),
        ("small_pretrain", {}, [("top-1 on 302 held-out drawings, one seed: clip art", 61.6, 70.0)]),
        (
            "mae_finetune_imagenet",
            {"model": {"name": "vit_l16"}},
            [("top-1 on ImageNet, by model; weights of mae_imagenet after 1600 epochs: vit_l16", 85.9, 70.0)],
        ),
        ("finetune_vtab", {}, [("mean of the 19 tasks, mean of 3 runs, over all of its weights", 72.72, None)]),
    ],
)
def test_what_a_number_is_of_is_told_by_its_key(tmp_path, recipe, over, expected):
    kind = "finetune" if "finetune" in recipe else "supervised"
    folder = made_run(tmp_path / "a", f'[[stage]]\nname = "one"\nkind = "{kind}"\nrecipe = "{recipe}"\n')
    trained(folder, "one", recipe, 0.7, **over)
    found = [(row.what, row.expected[0], row.ours and pytest.approx(row.ours)) for row in compared(read_run(folder))]
    measured = [row for row in found if row[2] is not None] or found
    assert measured == expected


def test_a_masked_models_own_accuracy_is_of_patches_and_beside_nothing(tmp_path):
    recipe = "masked_patch_vit_b16_jft300m"
    folder = made_run(tmp_path / "a", f'[[stage]]\nname = "one"\nkind = "masked_patch"\nrecipe = "{recipe}"\n')
    trained(folder, "one", recipe, 0.35)
    (row,) = compared(read_run(folder))
    assert (row.expected, row.ours) == ((79.9, 79.9), None)


REAL = """
[[stage]]
name = "big"
kind = "supervised"
recipe = "vit_b16_imagenet21k"

[[stage]]
name = "rates"
kind = "finetune"
recipe = "finetune_imagenet"
init = "big"
sweep = "recipe"

[[stage]]
name = "tuned"
kind = "finetune"
recipe = "finetune_imagenet"
init = "big"
best = "rates"
sweep = { seed = [0, 1] }

[[stage]]
name = "weights"
kind = "convert"
set = { source = "{tuned-1}" }

[[stage]]
name = "plain"
kind = "evaluate"
set = { weights = "{tuned-0}", data = "there" }

[[stage]]
name = "real-0"
kind = "evaluate"
set = { weights = "{tuned-0}", data = "{real}" }

[[stage]]
name = "real-1"
kind = "evaluate"
set = { weights = "{weights}", data = "{real}" }

[[stage]]
name = "real-big"
kind = "evaluate"
set = { weights = "{big}", data = "{real}" }
"""


def test_real_accuracy_is_what_an_evaluation_with_real_labels_found(tmp_path):
    folder = made_run(tmp_path / "a", REAL)
    big = trained(folder, "big", "vit_b16_imagenet21k", 0.4)
    trained(folder, "rates-0", "finetune_imagenet", 0.7, init=str(big))
    for seed, top1 in enumerate((0.83, 0.85)):
        trained(folder, f"tuned-{seed}", "finetune_imagenet", top1, init=str(big), seed=seed)
    ended(folder, "weights", "convert", {"weights": str(folder / "stages/weights/model.safetensors"), "parameters": 1})
    ended(folder, "plain", "evaluate", {"top1": 0.5, "top5": 0.9, "images": 10})

    def ours() -> dict:
        run = read_run(folder)
        own = {what: row.ours for what, row in rows_of(run, "tuned").items()}
        return own | {what: row.ours for what, row in rows_of(run, "big").items() if row.ours is not None}

    own, reached = "top-1 on ReaL, by the weights it starts from: vit_b16_imagenet21k", "ImageNet"
    before = ours()
    assert before.pop(own) is None
    assert [what.rpartition(": ")[2] for what in before] == ["vit_b16_imagenet21k", reached]
    ended(folder, "real-0", "evaluate", {"top1": 0.88, "top5": 0.97, "images": 9, "unlabelled": 1, "labels": "ReaL"})
    assert ours()[own] == pytest.approx(88)
    ended(folder, "real-1", "evaluate", {"top1": 0.90, "top5": 0.97, "images": 9, "unlabelled": 1, "labels": "ReaL"})
    ended(folder, "real-big", "evaluate", {"top1": 0.2, "top5": 0.3, "images": 9, "unlabelled": 1, "labels": "ReaL"})
    after = ours()
    assert after.pop(own) == pytest.approx(89)
    (real,) = (after.pop(what) for what in list(after) if what.endswith(": ReaL"))
    assert real == pytest.approx(89)
    assert after == before == {what: pytest.approx(84) for what in before}


def test_held_out_images_with_real_labels_are_beside_real_accuracy_alone(tmp_path):
    write_val(tmp_path / "val.tar")
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", TRUTH)
    (tmp_path / "real.json").write_text(json.dumps([[2], [], [0, 1], [0], [2, 0], []]))
    build(tmp_path / "val.tar", tmp_path / "real", options={"real": str(tmp_path / "real.json")}, workers=1)
    build(tmp_path / "val.tar", tmp_path / "plain", workers=1)
    found = {}
    for name in ("real", "plain"):
        text = '[[stage]]\nname = "one"\nkind = "supervised"\nrecipe = "simple_vit_s16_imagenet"\n'
        folder = made_run(tmp_path / f"run-{name}", text)
        trained(folder, "one", "simple_vit_s16_imagenet", 0.7, data={"val": str(tmp_path / name)})
        found[name] = {row.what: row.ours for row in compared(read_run(folder))}
    top1, real, v2 = ("top-1, by epochs: 90 epochs", *(f"top-1 on {x}, by epochs: 90 epochs" for x in KINDS))
    assert found["plain"] == {top1: pytest.approx(70), real: None, v2: None}
    assert found["real"] == {top1: None, real: pytest.approx(70), v2: None}


def test_where_weights_come_from(run):
    stages = run.stages
    assert [stage.name for stage in ancestors(run, stages["cifar-1"])] == ["weights", "big"]
    assert parent(run, stages["big"]) is None
    assert parent(run, stages["scores"]) is stages["alone"]
    text = lineage(run)
    nested = [text.index(f"<b>{name}</b>") for name in ("big", "weights", "cifar-0", "cifar-1", "alone", "scores")]
    assert nested == sorted(nested)
    assert text.count("from nothing") == 1
    before = {name: text[: text.index(f"<b>{name}</b>")] for name in stages}
    depth = {name: each.count("<ul>") - each.count("</ul>") for name, each in before.items()}
    tuned = dict.fromkeys(("rates-0", "rates-1", "cifar-0", "cifar-1"), 3)
    assert depth == {"big": 1, "weights": 2, **tuned, "alone": 1, "scores": 2}
    assert "no checkpoint is there any more" in text
    assert "86,567,656 parameters" in text
