import json

import pytest

from launch.plan import read_plan
from launch.run import RUNNER, _set_aside, run_plan
from pipeline.models import create_model
from pipeline.weights import write_weights
from shards.atomic import only_one
from shards.errors import UserError
from tests.command import patchmill, refused
from tests.plans import SHARDS, write_plan

PLAN = f"""
name = "x"
{SHARDS}
[[stage]]
name = "tune"
kind = "finetune"
recipe = "small_finetune"
init = "w.safetensors"
[stage.set]
data = {{ train = "{{shards}}" }}
"""


def weights(folder, **settings) -> None:
    """Write weights that the stage can start from, or that ``settings`` make unfit."""
    model = {"name": "vit_ti8", "embed_dim": 128, "num_heads": 4, "depth": 6, "image_size": 48, "num_classes": 3}
    model |= {key: value for key, value in settings.items() if key != "seed"}
    made = create_model(**model, seed=settings.get("seed", 0))
    write_weights(folder / "w.safetensors", made.state_dict(), {"model": model, "classes": list("abc")})


@pytest.fixture
def plan(tmp_path):
    weights(tmp_path, seed=1)
    return write_plan(tmp_path, PLAN)


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
        weights(plan.parent, seed=2)
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


@pytest.mark.parametrize("why", ["from", "from before", "changed", "changed before"])
def test_a_stage_that_a_run_is_at_is_not_set_aside_nor_what_it_reads(plan, why):
    """``before``: the stage that it needs is made anew, or changed."""
    runs, stage = plan.parent / "runs", begun(plan)
    shards = stage.folder.with_name("shards")
    shards.mkdir()
    (shards / "inputs.json").write_text("{}")
    start = {"from": "tune", "from before": "shards"}.get(why)
    if why == "changed":
        weights(plan.parent, seed=2)
    elif why == "changed before":
        (plan.parent / "images" / "red" / "000.png").unlink()
        (shards / "inputs.json").write_text('{"inputs": "of before"}')
    only = "shards" if why == "changed before" else None
    with only_one(stage.folder / "logs" / RUNNER, "patchmill run"):
        before = sorted(plan.parent.rglob("*"))
        with pytest.raises(UserError, match=r"^a `patchmill run` is at \S+/stages/tune; wait for it, or stop it$"):
            run_plan(read_plan(plan, runs), start, only)
        assert sorted(plan.parent.rglob("*")) == before


def test_a_plan_that_a_run_is_at_is_not_submitted(plan):
    stage = begun(plan)
    with only_one(stage.folder / "logs" / RUNNER, "patchmill run"):
        (plan.parent / "sbatch").touch(0o755)  # it does not come to that
        told = refused(patchmill("submit", plan, cwd=plan.parent, PATH=str(plan.parent)))
    assert told == f"error: a `patchmill run` is at {stage.folder}; wait for it, or stop it"


def test_weights_that_a_stage_cannot_start_from_are_told_before_anything_starts(plan):
    runs = plan.parent / "runs"
    assert read_plan(plan, runs).stages[1].settings.init == str(plan.parent / "w.safetensors")
    weights(plan.parent, depth=2)
    with pytest.raises(
        UserError, match=r"stage tune of .*w\.safetensors is a checkpoint of another model: its depth is 2"
    ):
        read_plan(plan, runs)
    (plan.parent / "w.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"stage tune of .*plan\.toml: .*w\.safetensors"):
        read_plan(plan, runs)
    plan.write_text(PLAN.replace("w.safetensors", "./images"))
    with pytest.raises(UserError, match=r"stage tune of .*images, nor other weights; give a checkpoint or"):
        read_plan(plan, runs)
    plan.write_text(PLAN.replace("w.safetensors", "s3://bucket/w.safetensors"))
    with pytest.raises(UserError, match=r"stage tune of .*there is no s3:/bucket/w\.safetensors; give a checkpoint"):
        read_plan(plan, runs)
