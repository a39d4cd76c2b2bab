"""Which stages a run takes: from one on, one alone, and what is told of them without running any."""

import json
import re

import pytest
from typer.testing import CliRunner

from launch.choice import anew, chosen
from launch.cli import app
from launch.plan import read_plan
from launch.run import run_plan
from shards.build import build
from shards.errors import PatchmillError, UserError
from tests import forked
from tests.images import make_image_folder

PLAN = """
name = "x"
[[stage]]
name = "one"
kind = "shards"
set = { source = "images" }
[[stage]]
name = "two"
kind = "shards"
after = ["one"]
set = { source = "images", seed = 2 }
[[stage]]
name = "three"
kind = "shards"
set = { source = "images", seed = 3 }
[[stage]]
name = "rates"
kind = "finetune"
recipe = "small_finetune"
sweep = { "optim.lr" = [0.1, 0.2] }
set = { data = { train = "{two}", val = "{three}" } }
"""


@pytest.fixture
def plan(tmp_path):
    make_image_folder(tmp_path / "images", per_class=2)
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def read(plan):
    return read_plan(plan, plan.parent / "runs")


def done(plan, *names: str, digest: str | None = None) -> None:
    """Leave behind what stages leave that have finished."""
    for stage in read(plan).stages:
        if stage.table.name in names:
            stage.folder.mkdir(parents=True)
            told = {"digest": digest or stage.digest, "kind": stage.table.kind, "seconds": 0, "result": {}}
            (stage.folder / "result.json").write_text(json.dumps(told))
            (stage.folder / "inputs.json").write_text(json.dumps({"inputs": stage.inputs}))
            build(plan.parent / "images", stage.folder / "data", workers=1)


def test_what_follows_a_stage_and_what_is_alone(plan):
    assert anew(read(plan), None) == set()
    assert anew(read(plan), "one") == {"one", "two", "rates-0", "rates-1"}
    assert anew(read(plan), "three") == {"three", "rates-0", "rates-1"}
    assert anew(read(plan), "rates-1") == {"rates-1"}
    assert chosen(read(plan), None) == {"one", "two", "three", "rates-0", "rates-1"}
    assert chosen(read(plan), "three") == {"three"}
    with pytest.raises(UserError, match=r"--only rates needs two, three, which have not finished with these settings"):
        chosen(read(plan), "rates")
    done(plan, "two", "three")
    assert chosen(read(plan), "rates") == {"rates-0", "rates-1"}
    with pytest.raises(UserError, match=r"--only two needs one, which has not finished with these settings; run the"):
        chosen(read(plan), "two")
    with pytest.raises(
        UserError, match=r"has no stage 'rate' \(did you mean 'rates'\?\); it has one, two, three, rate"
    ):
        anew(read(plan), "rate")


def test_a_dry_run_tells_what_would_happen_and_touches_nothing(plan):
    def told(*arguments: str) -> dict[str, str]:
        ended = CliRunner().invoke(
            app, ["run", str(plan), "--runs", str(plan.parent / "runs"), "--dry-run", *arguments]
        )
        assert ended.exit_code == 0, ended.output
        rows = re.findall(r"^│ (\S+) +│.*│ (.*?) +│$", ended.stdout, re.MULTILINE)
        return dict(rows)

    names = ["one", "two", "three", "rates-0", "rates-1"]
    assert told() == dict.fromkeys(names, "runs")
    assert not (plan.parent / "runs").exists()
    done(plan, "one", "two")
    done(plan, "three", digest="of other settings")
    (read(plan).stages[-1].folder / "checkpoints").mkdir(parents=True)
    before = sorted(map(str, plan.parent.rglob("*")))
    fate = dict(zip(names, ["done before, skipped"] * 2 + ["made anew: settings or inputs changed"], strict=False))
    assert told() == fate | {"rates-0": "runs", "rates-1": "goes on"}
    assert told("--from", "two") == fate | {"two": "made anew", "rates-0": "runs", "rates-1": "made anew"}
    assert told("--only", "one") == dict.fromkeys(names, "left out") | {"one": "done before, skipped"}
    assert sorted(map(str, plan.parent.rglob("*"))) == before
    both = CliRunner().invoke(app, ["run", str(plan), "--from", "one", "--only", "one"])
    assert isinstance(both.exception, UserError)
    assert "give one of them" in str(both.exception)


@pytest.mark.long
def test_a_run_from_a_stage_on_makes_it_anew_with_what_follows_even_if_it_fails_in_between(plan, monkeypatch, capsys):
    plan.write_text(PLAN[: PLAN.index('[[stage]]\nname = "rates"')])
    monkeypatch.setattr("launch.launchers.run_ranks", forked.run_ranks)
    run_plan(read(plan), only="three")
    assert [stage.table.name for stage in read(plan).stages if stage.folder.exists()] == ["three"]
    run_plan(read(plan))
    stages = {stage.table.name: stage.folder for stage in read(plan).stages}
    written = {name: (folder / "result.json").stat().st_mtime_ns for name, folder in stages.items()}
    capsys.readouterr()
    monkeypatch.setattr("launch.run._run", broken)
    with pytest.raises(PatchmillError, match="out of order"):
        run_plan(read(plan), start="one")
    monkeypatch.undo()
    monkeypatch.setattr("launch.launchers.run_ranks", forked.run_ranks)
    run_plan(read(plan))
    assert (stages["three"] / "result.json").stat().st_mtime_ns == written["three"]
    for name in ("one", "two"):
        assert (stages[name] / "result.json").stat().st_mtime_ns > written[name]
        kept = stages[name].with_name(f"{name}.before-1")
        assert (kept / "result.json").stat().st_mtime_ns == written[name]
        assert f"{name} is made anew: what it made before is kept in {kept}" in capsys.readouterr().err or name == "two"


def broken(*_: object) -> None:
    raise PatchmillError("out of order")
