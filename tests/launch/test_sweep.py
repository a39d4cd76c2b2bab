"""Sweeps of plans: as many stages as combinations, and what the best of them hands on."""

import json
import shutil

import pytest

from launch.plan import after_a_sweep, read_plan
from launch.sweep import Sweep
from pipeline.report.accuracies import accuracies
from pipeline.report.run import read_run
from shards.errors import UserError
from tests.command import ROOT, patchmill

PLAN = """
name = "x"

[[stage]]
name = "shards"
kind = "shards"
set = { source = "images", split = { val = 0.25 }, resize_short = 32 }

[[stage]]
name = "start"
kind = "supervised"
recipe = "small_pretrain"
set = { duration = "1 epoch", data = { train = "{shards}/train" } }

[[stage]]
name = "rates"
kind = "finetune"
recipe = "small_finetune"
init = "start"
sweep = { "optim.lr" = [1e-9, 3e-2, 3e-9], "schedule.warmup" = ["0 epochs", "1 step", "0 epochs"] }
set = { data = { train = "{shards}/train", val = "{shards}/val" } }

[[stage]]
name = "final"
kind = "finetune"
recipe = "small_finetune"
init = "start"
best = "rates"
sweep = { seed = [0, 1] }
set = { data = { train = "{shards}/train", val = "{shards}/val" } }

[[stage]]
name = "score"
kind = "evaluate"
set = { weights = "{rates}", data = "{shards}/val" }
"""


@pytest.fixture
def plan(tmp_path):
    for name in ("flags", "food"):
        shutil.copytree(ROOT / "examples/clipart/images" / name, tmp_path / "images" / name)
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def result(plan, name: str, top1: float) -> None:
    """Leave behind what a stage leaves that has finished."""
    stage = next(each for each in plan.stages if each.table.name == name)
    stage.folder.mkdir(parents=True)
    told = {"digest": stage.digest, "kind": stage.table.kind, "result": {"val": {"top1": top1}}}
    (stage.folder / "result.json").write_text(json.dumps(told))


def test_what_comes_after_a_sweep_waits_for_all_of_it_and_takes_the_best(plan, tmp_path):
    checked = read_plan(plan, tmp_path / "runs")
    names = ["shards", "start", "rates-0", "rates-1", "rates-2", "final-0", "final-1", "score"]
    stages = {stage.table.name: stage for stage in checked.stages}
    assert list(stages) == names
    assert [stages[f"rates-{n}"].settings.optim.lr for n in range(3)] == [1e-9, 3e-2, 3e-9]
    assert [stages[f"final-{n}"].settings.seed for n in range(2)] == [0, 1]
    assert set(stages["final-1"].needs) == {"shards", "start", "rates-0", "rates-1", "rates-2"}
    for number, top1 in enumerate((0.5, 0.75, 0.75)):
        result(checked, f"rates-{number}", top1)
        settled = {stage.table.name: stage for stage in after_a_sweep(checked).stages}
        # Before the last has ended nothing is settled; of equals the first is taken.
        assert settled["final-0"].settings.optim.lr == (3e-2 if number == 2 else 1e-9)
        assert settled["final-0"].settings.schedule.warmup == ("1 step" if number == 2 else "0 epochs")
        best = "rates-1" if number == 2 else "rates-0"
        assert settled["score"].settings.weights == str(settled[best].folder)
    assert settled["final-0"].digest != stages["final-0"].digest
    assert settled["rates-1"].digest == stages["rates-1"].digest


def test_a_recipe_brings_its_own_sweep(plan, tmp_path):
    text = PLAN.replace('recipe = "small_finetune"\ninit = "start"\nsweep = {', 'recipe = "finetune_cifar10"\nX = {', 1)
    text = "\n".join(
        line if not line.startswith("X =") else 'init = "start"\nsweep = "recipe"' for line in text.split("\n")
    )
    plan.write_text(text)
    rates = [stage for stage in read_plan(plan, tmp_path / "runs").stages if stage.table.name.startswith("rates-")]
    assert [stage.settings.optim.lr for stage in rates] == [0.001, 0.003, 0.01, 0.03]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("[1e-9, 3e-2, 3e-9]", "[1e-9, 3e-2]", r"sweep of stage rates is .*give lists of one length by setting"),
        ('"optim.lr" =', '"optim.rl" =', r"unknown setting optim\.rl in stage rates-0 .*did you mean 'lr'"),
        ('best = "rates"', 'best = "start"', "best of stage final .* is 'start', which is no stage with a sweep"),
        ('name = "score"', 'name = "rates-1"', "two stages of .* are named 'rates-1'; rename one"),
        ("sweep = { seed = [0, 1] }", "sweep = { }", "stage final has a sweep without values"),
        ("sweep = { seed = [0, 1] }", 'sweep = "recipe"', "stage final has a sweep without values in its recipe"),
        ("sweep = { seed = [0, 1] }", 'sweep = "seed"', "sweep of stage final is 'seed'; give lists"),
        ('kind = "evaluate"', 'kind = "evaluate"\nsweep = { batch = [1] }', "of kind evaluate takes none; remove it"),
    ],
)  # fmt: skip
def test_a_sweep_that_makes_no_sense_is_one_line(plan, tmp_path, before, after, words):
    assert before in PLAN
    plan.write_text(PLAN.replace(before, after))
    with pytest.raises(UserError, match=words) as raised:
        read_plan(plan, tmp_path / "runs")
    assert "\n" not in str(raised.value)


def test_the_best_is_told_by_top1_or_by_loss_and_seeds_by_their_mean():
    def results(*values: dict | None) -> list[dict]:
        return [{"result": {"val": value}} for value in values]

    rates = Sweep("rates", [{"optim.lr": 0.1}, {"optim.lr": 0.2}])
    assert rates.best([None, *results({"top1": 1.0})]) is None
    assert rates.best(results({"top1": 0.5, "loss": 1.0}, {"top1": 0.6, "loss": 2.0})) == 1
    assert rates.best(results({"loss": 1.0}, {"loss": 2.0})) == 0
    assert rates.summary(results({"top1": 0.5}, {"top1": 0.625})) == "best optim.lr=0.2: top-1 62.50 %"
    with pytest.raises(UserError, match=r"rates tell nothing of held-out images; set data\.val"):
        rates.best(results(None, None))
    seeds = Sweep("final", [{"seed": n} for n in range(3)])
    told = seeds.summary(results({"top1": 0.1}, {"top1": 0.2}, {"top1": 0.3}))
    assert told == "top-1 20.00 ± 10.00 % over 3 seeds"


def test_a_sweep_runs_its_best_goes_on_and_the_report_has_the_mean_of_the_seeds(plan, tmp_path):
    done = patchmill("run", plan, "--smoke", cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "x-smoke"
    top1 = [json.loads((run / f"stages/rates-{n}/result.json").read_text())["result"]["val"]["top1"] for n in range(3)]
    best = max(range(3), key=top1.__getitem__)
    value = [1e-9, 3e-2, 3e-9][best]
    assert f"rates: best optim.lr={value}" in done.stderr
    resolved = [(run / f"stages/final-{seed}/resolved.toml").read_text() for seed in range(2)]
    assert all(f"lr = {value}" in text for text in resolved)
    finals = [
        json.loads((run / f"stages/final-{n}/result.json").read_text())["result"]["val"]["top1"] for n in range(2)
    ]
    mean = sum(finals) / 2
    assert f"final: top-1 {100 * mean:.2f} ± " in done.stderr
    score = json.loads((run / "stages/score/result.json").read_text())["result"]
    assert score["top1"] == pytest.approx(top1[best])
    rows = {row.what: row for row in accuracies(read_run(run))}
    assert {f"rates-{n} (finetune)" for n in range(3)} < rows.keys()
    assert rows["final (finetune)"].top1 == pytest.approx(mean)
    assert "mean of 2 seeds, ± " in rows["final (finetune)"].how
    assert "final-0 (finetune)" not in rows
    again = patchmill("run", plan, "--smoke", cwd=tmp_path, timeout=100)
    assert again.stderr.count("done before, skipped") == 8
