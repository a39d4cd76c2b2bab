import json

import pytest

from launch.plan import read_plan
from launch.run import _set_aside
from tests.images import make_image_folder

PLAN = """
name = "x"
[[stage]]
name = "shards"
kind = "shards"
set = { source = "images" }
[[stage]]
name = "tune"
kind = "finetune"
recipe = "small_finetune"
init = "w.safetensors"
[stage.set]
data = { train = "{shards}" }
"""


@pytest.fixture
def plan(tmp_path):
    make_image_folder(tmp_path / "images", per_class=2)
    (tmp_path / "w.safetensors").write_bytes(b"one")
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path / "plan.toml"


def begun(plan, result: dict | None = None):
    """The stage as a killed (or finished) run left it."""
    stage = read_plan(plan, plan.parent / "runs").stages[1]
    (stage.folder / "checkpoints").mkdir(parents=True)
    (stage.folder / "inputs.json").write_text(json.dumps({"inputs": stage.inputs}))
    if result is not None:
        (stage.folder / "result.json").write_text(json.dumps(result))
    return stage


def test_an_unfinished_stage_goes_on_while_its_inputs_are_the_same(plan):
    stage = begun(plan)
    plan.write_text(PLAN + "[stage.set.optim]\nlr = 0.1\n")
    changed = read_plan(plan, plan.parent / "runs").stages[1]
    assert changed.digest != stage.digest
    _set_aside(changed)
    assert (stage.folder / "checkpoints").exists()


@pytest.mark.parametrize("change", ["weights", "images"])
def test_an_unfinished_stage_with_other_inputs_is_set_aside_whole(plan, change, capsys):
    stage = begun(plan)
    if change == "weights":
        (plan.parent / "w.safetensors").write_bytes(b"another")
    else:
        (plan.parent / "images" / "red" / "000.png").unlink()
    _set_aside(read_plan(plan, plan.parent / "runs").stages[1])
    assert not stage.folder.exists()
    assert (stage.folder.parent / "tune.before-1" / "checkpoints").exists()
    assert "kept in" in capsys.readouterr().err


def test_a_finished_stage_with_other_settings_is_set_aside(plan):
    stage = begun(plan, result={"digest": "of before"})
    _set_aside(stage)
    assert (stage.folder.parent / "tune.before-1" / "result.json").exists()
