import shutil

import pytest

from pipeline.report.accuracies import accuracies
from pipeline.report.page import names
from pipeline.report.run import read_run
from shards.errors import UserError
from tests.pipeline.report.made import ended, made_run, trained
from tests.shards.datasets import Made, plain, write_dataset

PLAN = """
[[stage]]
name = "big"
kind = "supervised"
recipe = "vit_b16_imagenet21k"

[[stage]]
name = "rates"
kind = "finetune"
recipe = "finetune_cifar10"
init = "big"
sweep = { "optim.lr" = [0.001, 0.003, 0.01] }

[[stage]]
name = "seeds"
kind = "finetune"
recipe = "finetune_cifar10"
init = "big"
best = "rates"
sweep = { seed = [0, 1] }

[[stage]]
name = "later"
kind = "evaluate"
set = { weights = "{seeds}", data = "there" }
"""


@pytest.fixture
def run(tmp_path):
    run = made_run(tmp_path / "runs" / "a", PLAN)
    big = trained(run, "big", "vit_b16_imagenet21k", 0.4)
    for number, top1 in enumerate((0.7, 0.9, 0.9)):
        trained(run, f"rates-{number}", "finetune_cifar10", top1, init=str(big))
    return run


def test_a_run_has_its_stages_those_of_sweeps_too_begun_or_not(run):
    found = read_run(run)
    assert found.name == "a"
    assert list(found.stages) == ["big", "rates-0", "rates-1", "rates-2", "later"]
    assert found.sweeps == {"rates": ["rates-0", "rates-1", "rates-2"]}
    assert found.stages["later"].result is None
    assert found.named("rates").name == "rates-1"  # of equals the first
    assert found.named("later").name == "later"
    assert found.named("seeds") is None
    assert [stage.name for stage in found.finished("finetune")] == ["rates-0", "rates-1", "rates-2"]


def test_paths_of_a_run_that_moved_are_still_of_its_stages(run, tmp_path):
    shutil.move(run, tmp_path / "elsewhere" / "a")
    found = read_run(tmp_path / "elsewhere" / "a")
    assert found.at(found.stages["rates-0"].settings["init"]).name == "big"
    assert found.at("/other/b/stages/big/model.safetensors") is None  # of another run
    assert found.at("/weights/big.npz") is None
    rows = {row.what: row for row in accuracies(found)}
    assert rows["rates-1 (finetune)"].how == "384 px, 200 images seen, after 200 in pre-training"
    assert rows["rates-1 (finetune)"].main


def test_a_stage_that_is_under_way_tells_what_it_has(run):
    (run / "stages/big/result.json").unlink()
    stage = read_run(run).stages["big"]
    assert (stage.samples, stage.val, stage.seconds) == (200, {"loss": 1.0, "top1": 0.4}, None)
    rows = {row.what: row for row in accuracies(read_run(run))}
    assert rows["big (supervised)"].how == "224 px, 200 images seen so far, from scratch"


def test_a_training_stage_by_hand_is_a_run_of_one(run):
    found = read_run(run / "stages" / "rates-0")
    assert (found.name, list(found.stages), found.plan) == ("rates-0", ["rates-0"], None)
    assert found.stages["rates-0"].kind == "finetune"
    assert [row.top1 for row in accuracies(found)] == [0.7]


def test_weights_that_are_gone_are_named(tmp_path):
    run = made_run(tmp_path / "a", PLAN)
    trained(run, "rates-0", "finetune_cifar10", 0.5, init="/gone/model.npz")
    assert accuracies(read_run(run))[-1].how == "384 px, 200 images seen, from /gone/model.npz"


def test_few_shot_results_of_several_data_sets_are_told_apart(tmp_path):
    run = made_run(
        tmp_path / "a", "".join(f'[[stage]]\nname = "{name}"\nkind = "fewshot"\n' for name in ("one", "two"))
    )
    for name, top1 in (("one", 0.5), ("two", 0.6)):
        ended(run, name, "fewshot", {"features": {"all": top1, "shots": {"5": top1 - 0.1}}})
        rows = [(row.what, row.top1) for row in accuracies(read_run(run))]
        if name == "one":
            assert rows == [("frozen features, least squares", 0.5), ("frozen features, 5-shot", 0.4)]
    assert [what for what, _ in rows] == [
        "frozen features, least squares (one)", "frozen features, 5-shot (one)",
        "frozen features, least squares (two)", "frozen features, 5-shot (two)",
    ]  # fmt: skip
    assert [top1 for _, top1 in rows] == [0.5, 0.4, 0.6, 0.5]


def test_the_most_frequent_class_of_several_data_sets_is_told_apart_of_each_the_last_held_out_images(tmp_path):
    stages = ("one", "shards"), ("two", "shards"), ("rates", "finetune"), ("final", "finetune"), ("other", "finetune")
    text = "".join(f'[[stage]]\nname = "{name}"\nkind = "{kind}"\n' for name, kind in stages)
    run = made_run(tmp_path / "a", text)
    made = {"one/dev": "rr", "one/val": "rrrg", "two/test": "rggggg"}
    for place, colours in made.items():
        name, part = place.split("/")
        if name == "one":
            ended(run, name, "shards", {"classes": ["green", "red"]})
        images = [Made(f"k{i}", plain("red"), (int(colour == "r"),)) for i, colour in enumerate(colours)]
        write_dataset(run / "stages" / name / "data" / part, ["green", "red"], [images])

    def said() -> list[tuple]:
        rows = accuracies(read_run(run))
        return [(row.what, row.top1, row.how) for row in rows if row.what.startswith("most frequent")]

    held_out = {"rates": "one/dev", "final": "one/val", "other": "two/test"}
    for name, place in held_out.items():
        url = run / "stages" / place.replace("/", "/data/")
        trained(run, name, "finetune_cifar10", 0.5, data={"val": str(url)})
        if name == "final":
            assert said() == [("most frequent class", 0.75, "always saying red")]
            ended(run, "two", "shards", {"classes": ["green", "red"]})
            assert said() == [("most frequent class in one/val", 0.75, "always saying red")]
    assert said() == [
        ("most frequent class in one/val", 0.75, "always saying red"),
        ("most frequent class in two/test", pytest.approx(5 / 6), "always saying green"),
    ]
    elsewhere = write_dataset(tmp_path / "elsewhere", ["green", "red"], [[Made("k", plain("red"), (1,))]])
    shutil.rmtree(run / "stages" / "other")
    trained(run, "other", "finetune_cifar10", 0.5, data={"val": str(elsewhere)})
    assert said()[1] == (f"most frequent class in {elsewhere}", 1.0, "always saying red")


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"is no run: it holds no plan\.toml; give the folder RUNS/NAME"):
        read_run(tmp_path)


def test_runs_of_one_name_are_told_apart_by_their_paths(run, tmp_path):
    shutil.copytree(run, tmp_path / "others" / "a")
    shutil.copytree(run, tmp_path / "others" / "b")
    runs = [read_run(tmp_path / each / name) for each, name in (("runs", "a"), ("others", "a"), ("others", "b"))]
    assert names(runs[:2]) == ["runs/a", "others/a"]
    assert names(runs[1:]) == ["a", "b"]
    with pytest.raises(UserError, match="one run is given twice"):
        names([runs[0], runs[0]])
