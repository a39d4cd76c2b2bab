"""Sweeps of plans: as many stages as combinations, and what the best of them hands on."""

import json
import math
import re
import shutil

import pytest

from launch.plan import after_a_sweep, read_plan
from launch.run import run_plan
from launch.sweep import Sweep, sweep_of
from pipeline.report.accuracies import accuracies
from pipeline.report.run import read_run
from shards.errors import UserError
from tests import forked
from tests.command import ROOT

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


def named(plan, name: str):
    """Return a stage of a plan."""
    return next(each for each in plan.stages if each.table.name == name)


def result(plan, name: str, val: dict | None) -> None:
    """Leave behind what a stage leaves that has finished."""
    stage = named(plan, name)
    stage.folder.mkdir(parents=True, exist_ok=True)
    told = {"digest": stage.digest, "kind": stage.table.kind, "seconds": 0, "result": {"val": val}}
    (stage.folder / "result.json").write_text(json.dumps(told))
    (stage.folder / "inputs.json").write_text(json.dumps({"inputs": stage.inputs}))


def test_what_comes_after_a_sweep_waits_for_all_of_it_and_takes_the_best(plan, tmp_path):
    checked = read_plan(plan, tmp_path / "runs")
    names = ["shards", "start", "rates-0", "rates-1", "rates-2", "final-0", "final-1", "score"]
    stages = {stage.table.name: stage for stage in checked.stages}
    assert list(stages) == names
    assert [stages[f"rates-{n}"].settings.optim.lr for n in range(3)] == [1e-9, 3e-2, 3e-9]
    assert [stages[f"final-{n}"].settings.seed for n in range(2)] == [0, 1]
    assert set(stages["final-1"].needs) == {"shards", "start", "rates-0", "rates-1", "rates-2"}
    for number, top1 in enumerate((0.5, 0.75, 0.75)):
        result(checked, f"rates-{number}", {"top1": top1})
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
        ('kind = "evaluate"', 'kind = "evaluate"\nbest = "rates"', "score .* has best, but a .* evaluate takes none"),
        ("[1e-9, 3e-2, 3e-9]", '"fast"', r"sweep of stage rates is .*give lists of one length by setting"),
        ('best = "rates"', 'best = "rate"', "best of stage final .* is 'rate', which is no stage with a sweep"),
        ('"{rates}"', '"{rate}"', r"needs stage 'rate', which is not there \(did you mean 'rates'\?\)"),
        ("seed = [0, 1]", '"optim.lr" = [0.1, 0.2]', "final-0 .* has optim.lr of its own, and from the best of rates"),
        ('init = "start"', 'init = "weights"', "needs stage 'weights', which is .*, or write ./weights for a path"),
        ('init = "start"', 'init = "shards"', "init of stage rates-0 .* is 'shards', of kind shards, which makes no"),
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


def test_the_best_of_a_sweep_is_only_asked_for_where_held_out_images_tell_it(plan, tmp_path):
    blind = PLAN.replace(', val = "{shards}/val" } }', " } }")
    plan.write_text(blind)
    with pytest.raises(UserError, match=r"final-0 .* takes the best of rates, which no held-out images tell; set"):
        read_plan(plan, tmp_path / "runs")
    alone = blind[: blind.index('[[stage]]\nname = "final"')] + '[[stage]]\nname = "report"\nkind = "report"\n'
    plan.write_text(alone)
    checked = read_plan(plan, tmp_path / "runs")
    for number in range(3):
        result(checked, f"rates-{number}", None)
    assert after_a_sweep(checked).stages[-1].digest == checked.stages[-1].digest
    assert named(checked, "rates-0").sweep.summary([{"result": {"val": None}}] * 3) == "3 runs"


def test_a_stage_that_began_with_one_best_does_not_pass_for_one_with_another(plan, tmp_path):
    checked = read_plan(plan, tmp_path / "runs")
    found = []
    for best in range(2):
        for number in range(3):
            result(checked, f"rates-{number}", {"top1": float(number == best)})
        score = named(after_a_sweep(checked), "score")
        assert score.settings.weights.endswith(f"rates-{best}")
        found.append((score.digest, score.inputs))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_a_best_that_was_found_with_another_best_hands_on_both(plan, tmp_path):
    decay = """
[[stage]]
name = "decays"
kind = "finetune"
recipe = "small_finetune"
init = "start"
best = "rates"
sweep = { "optim.weight_decay" = [0.0, 0.5] }
set = { data = { train = "{shards}/train", val = "{shards}/val" } }
"""
    plan.write_text(PLAN.replace('best = "rates"', 'best = "decays"') + decay)
    checked = read_plan(plan, tmp_path / "runs")
    for number in range(3):
        result(checked, f"rates-{number}", {"top1": float(number == 1)})
    checked = after_a_sweep(checked)
    for number in range(2):
        result(checked, f"decays-{number}", {"top1": float(number == 1)})
    final = named(after_a_sweep(checked), "final-0").settings
    assert (final.optim.lr, final.schedule.warmup, final.optim.weight_decay) == (3e-2, "1 step", 0.5)


def test_what_ran_stays_what_it_was_when_its_source_changes_meanwhile(plan, tmp_path):
    checked = read_plan(plan, tmp_path / "runs")
    ran = [stage.table.name for stage in checked.stages].index("rates-2") + 1
    next((tmp_path / "images" / "food").iterdir()).unlink()
    settled, fresh = after_a_sweep(checked, ran), read_plan(plan, tmp_path / "runs")
    assert settled.stages[:ran] == checked.stages[:ran]
    # What is made now is made of the shards of before: once there are others, it is no longer done.
    assert settled.stages[-1].digest == checked.stages[-1].digest != fresh.stages[-1].digest


@pytest.mark.long
def test_a_sweep_over_what_other_stages_make_ends_when_its_last_run_does_whichever_that_is(
    plan, tmp_path, monkeypatch, capsys
):
    early = PLAN[: PLAN.index('[[stage]]\nname = "rates"')]
    tune = """
[[stage]]
name = "tune"
kind = "finetune"
recipe = "small_finetune"
sweep = { init = ["{late}", "{start}"] }
set = { data = { train = "{shards}/train", val = "{shards}/val" } }
"""
    late = early[early.index('[[stage]]\nname = "start"') :].replace('"start"', '"late"')
    plan.write_text(early + tune + late)
    checked = read_plan(plan, tmp_path / "runs")
    assert [stage.table.name for stage in checked.stages] == ["shards", "start", "tune-1", "late", "tune-0"]
    monkeypatch.setattr("launch.launchers.run_ranks", forked.run_ranks)
    for stage in checked.stages[:-1]:
        result(checked, stage.table.name, {"top1": 0.25})
    with pytest.raises(UserError, match="stage tune-0 ended with exit code 2"):  # nobody made its weights
        run_plan(checked)
    assert "tune: " not in capsys.readouterr().err
    result(checked, "tune-0", {"top1": 0.5})
    run_plan(checked)
    assert "[5/5] tune-0: done before, skipped\ntune: best init={late}: top-1 50.00 %\n" in capsys.readouterr().err


EACH = """
[[stage]]
name = "each"
kind = "finetune"
recipe = "small_finetune"
sweep = [{ init = ["start", "{rates-*}"] }, { seed = [0, 1] }]
beside = { "of the paper" = [1, 2, 3, 4, 5, 6, 7, "no"] }
set = { data = { train = "{shards}/train", val = "{shards}/val" } }
""".replace('"start"', '"{start}"')


def test_a_sweep_may_go_over_all_runs_of_another(plan, tmp_path):
    plan.write_text(PLAN + EACH)
    checked = read_plan(plan, tmp_path / "runs")
    inits = [named(checked, f"each-{number}").settings.init for number in range(8)]
    stages = tmp_path / "runs" / "x" / "stages"
    assert inits == [str(stages / name) for name in ("start", "rates-0", "rates-1", "rates-2") for _ in range(2)]
    for before, after, words in [
        ("{rates-*}", "{rate-*}", r"sweep of stage each names {rate-\*}, and no stage above it with a sweep is rate"),
        (', "no"]', "]", r"each of .* has 8 runs, and 7 values of 'of the paper' beside them; give one for each"),
        ("sweep = [{", "after = []  # [{", "stage each of .* has no sweep to put beside of; remove beside"),
    ]:
        plan.write_text(PLAN + EACH.replace(before, after))
        with pytest.raises(UserError, match=words):
            read_plan(plan, tmp_path / "runs")


def test_values_of_any_kind_are_set_as_they_are():
    told = [{"data": [{"resolution": 32}, {"resolution": 64}]}, {"track.wandb": ["🪡"], "optim.clip": [math.inf]}]
    sweep = sweep_of("x", told, None)
    settings = {"data": {"resolution": 64}, "track": {"wandb": "🪡"}, "optim": {"clip": math.inf}}
    assert [sweep.settings(number) for number in range(2)][1] == settings


def test_a_run_without_a_finite_loss_is_never_the_best():
    sweep = Sweep("rates", [{"optim.lr": 1.0}, {"optim.lr": 0.5}])
    found = [{"result": {"val": {"loss": loss}}} for loss in (math.nan, 7.0)]
    assert sweep.best(found) == 1
    assert sweep.summary(found) == "best optim.lr=0.5: loss 7.00"


@pytest.mark.long
def test_a_sweep_runs_its_best_goes_on_and_the_report_has_the_mean_of_the_seeds(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("launch.launchers.run_ranks", forked.run_ranks)
    run_plan(read_plan(plan, tmp_path / "runs", smoke=True))
    said = capsys.readouterr().err
    run = tmp_path / "runs" / "x-smoke"
    top1 = [json.loads((run / f"stages/rates-{n}/result.json").read_text())["result"]["val"]["top1"] for n in range(3)]
    best = max(range(3), key=top1.__getitem__)
    value = [1e-9, 3e-2, 3e-9][best]
    assert f"rates: best optim.lr={value}" in said
    resolved = [(run / f"stages/final-{seed}/resolved.toml").read_text() for seed in range(2)]
    assert all(f"lr = {value}" in text for text in resolved)
    finals = [
        json.loads((run / f"stages/final-{n}/result.json").read_text())["result"]["val"]["top1"] for n in range(2)
    ]
    mean = sum(finals) / 2
    assert f"final: top-1 {100 * mean:.2f} ± " in said
    score = json.loads((run / "stages/score/result.json").read_text())["result"]
    assert score["top1"] == pytest.approx(top1[best])
    rows = {row.what: row for row in accuracies(read_run(run))}
    assert {f"rates-{n} (finetune)" for n in range(3)} < rows.keys()
    assert rows["final (finetune)"].top1 == pytest.approx(mean)
    assert "mean of 2 seeds, ± " in rows["final (finetune)"].how
    assert "final-0 (finetune)" not in rows
    run_plan(read_plan(plan, tmp_path / "runs", smoke=True))
    assert capsys.readouterr().err.count("done before, skipped") == 8

    # A sweep of fewer values: what it had more is in no report.
    plan.write_text(re.sub(r", 3e-9\]|, \"0 epochs\"\]", "]", PLAN))
    run_plan(read_plan(plan, tmp_path / "runs", smoke=True))
    assert "sweep rates has no rates-2 any more" in capsys.readouterr().err
    assert (run / "stages/rates-2.before-1/result.json").exists()
    assert "rates-2 (finetune)" not in {row.what for row in accuracies(read_run(run))}
