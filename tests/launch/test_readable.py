"""What stages read is opened before anything starts: one line names stage, setting, value and remedy."""

import json
import shutil
from pathlib import Path

import pytest

from launch.plan import read_plan
from launch.readable import _open, check_readable, misfits
from pipeline.datasettings import TrainSource
from pipeline.models import create_model
from pipeline.weights import write_weights
from shards.build import build
from shards.dataset import Dataset
from shards.errors import UserError
from shards.storesettings import StoreSettings
from tests.command import patchmill, refused
from tests.images import build_image_set, make_image_folder
from tests.shards.servers import serve_faults

TRAIN = """
[[stage]]
name = "{name}"
kind = "{kind}"
[stage.set]
duration = "2 steps"
global_batch = 12
model = {{ name = "vit_ti8", embed_dim = 24, num_heads = 3, depth = 1 }}
engine = {{ kind = "accelerate" }}
data = {{ resolution = 16, {data} }}
{more}
"""
SHARDS = '[[stage]]\nname = "shards"\nkind = "shards"\nset = { source = "images" }\n'


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of images, ``set`` of its three classes, ``other`` of two, and weights for both."""
    folder = tmp_path_factory.mktemp("data")
    build_image_set(folder, per_class=4, shard_samples=4)
    make_image_folder(folder / "two", per_class=4, classes=("blue", "red"))
    build(folder / "two", folder / "other", workers=1)
    for name, classes in (("three", ["blue", "green", "red"]), ("two", ["blue", "red"]), ("features", [])):
        model = {"name": "vit_ti8", "embed_dim": 24, "num_heads": 3, "depth": 1, "image_size": 16}
        made = create_model(**(model := model | {"num_classes": len(classes)}), seed=0)
        write_weights(folder / f"{name}.safetensors", made.state_dict(), {"model": model, "classes": classes})
    return folder


def train(data: str, more: str = "", name: str = "train", kind: str = "supervised") -> str:
    return TRAIN.format(data=data, more=more, name=name, kind=kind)


def stage(kind: str, settings: str, name: str = "last") -> str:
    return f'[[stage]]\nname = "{name}"\nkind = "{kind}"\nset = {{ {settings} }}\n'


def read(folder: Path, text: str, smoke: bool = False):
    (folder / "plan.toml").write_text('name = "x"\n' + text)
    return read_plan(folder / "plan.toml", folder / "runs", smoke)


def check(plan) -> None:
    check_readable(plan, {stage.table.name for stage in plan.stages})


BOTH = 'train = "set", val = "set"'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (train('train = "images"'), r"data\.train: no data set at \S+images"),
        (train('train = "set", val = "images"'), r"data\.val: no data set at \S+images"),
        (train('train = "set", val = "other"'), r"data\.val: \S+other has other classes than \S+set; build both with"),
        (train('train = "set", exclude = "v9"'), r"data\.train: .*drop list.*v9"),
        (
            train('train = [{ url = "other", weight = 1 }, { url = "set", weight = 1 }]'),
            r"data\.train: 1 of the classes of \S+set are not among those of \S+other: 'green'; put",
        ),
        (train(BOTH, 'probe = { train = "set", test = "other", every = "1 steps" }'), r"probe\.test: .*other classes"),
        (train('train = "set/shards/*.tar", val = "set"'), r"duration: '1 epoch': nobody knows the epoch of a stream"),
        (train(BOTH, 'init = "two.safetensors"'), r"init: \S+two\.safetensors has head\.\w+ of shape \[2.* wants \[3"),
        (train(BOTH, 'init = "features.safetensors"'), r"init: \S+ has no head\.\w+, so no stage of kind 'supervised'"),
        (train(BOTH, 'resume = "images"'), r"resume: \S+images has no whole checkpoint; give one"),
        (stage("evaluate", 'weights = "three.safetensors", data = "images"'), r"data: no data set at"),
        (stage("evaluate", 'weights = "images", data = "set"'), r"weights: there is no whole latest checkpoint in .*"),
        (
            stage("evaluate", 'weights = "two.safetensors", data = "set"'),
            r"weights: the model knows 2 classes \(blue, red\), \S+set has 3 classes",
        ),
        (stage("evaluate", 'weights = "features.safetensors", data = "set"'), r"weights: the model has no head of"),
        (stage("convert", 'source = "set/shards/000000.tar"'), r"source: "),
        (stage("convert", 'source = "two.safetensors", set = { depth = 1.5 }'), r"source: .*depth"),
        (stage("fewshot", 'weights = "images", train = "set", test = "set"'), r"weights: there is no whole"),
        (stage("fewshot", 'weights = "two.safetensors", train = "set", test = "other"'), r"test: .*other classes than"),
        (stage("figures", 'weights = "set"'), r"weights: there is no whole"),
        (  # classes of weights that are yet to be made are those of their data
            train('train = "other"') + stage("convert", 'source = "{train}"', "made")
            + stage("evaluate", 'weights = "{made}", data = "set"'),
            r"weights: the model knows 2 classes \(blue, red\), \S+set has 3",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_before_anything_starts(data, text, told):
    plan = read(data, text)
    with pytest.raises(UserError, match=rf"^stage \w+ of \S+plan\.toml, .*{told}") as raised:
        check(plan)
    assert "\n" not in str(raised.value)
    assert not plan.run.exists()


@pytest.mark.parametrize(
    "text",
    [
        train(BOTH),
        train(BOTH, 'init = "three.safetensors"'),
        train(BOTH, 'init = "two.safetensors"', kind="finetune"),
        train('train = [{ url = "set", weight = 1 }, { url = "other", weight = 1 }]'),
        train('train = "set/shards/*.tar", val = "set"', 'evaluate.every = "1 step"\ncheckpoint.every = "1 step"'),
        train(BOTH) + stage("evaluate", 'weights = "{train}", data = "set"'),
        stage("evaluate", 'weights = "three.safetensors", data = "set"'),
        stage("fewshot", 'weights = "features.safetensors", train = "set", test = "set"'),
        SHARDS + train('train = "{shards}", val = "set"') + stage("evaluate", 'weights = "{train}", data = "other"'),
    ],
)
def test_what_fits_or_is_yet_to_be_made_passes(data, text):
    check(read(data, text))


def test_a_shard_that_is_gone_is_told(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    last = sorted((tmp_path / "set" / "shards").glob("*.tar"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=rf"data\.train: no object \S+{last.name}, .*; copy or build the data set"):
        check(read(tmp_path, train('train = "set"')))


def test_a_stage_that_is_done_or_left_out_is_not_looked_at_but_one_made_anew_is(data, tmp_path):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    plan = read(tmp_path, train('train = "set", val = "other"'))
    check_readable(plan, set())
    plan.stages[0].folder.mkdir(parents=True)
    (plan.stages[0].folder / "result.json").write_text(json.dumps({"digest": plan.stages[0].digest}))
    check(plan)
    with pytest.raises(UserError, match="other classes"):
        check_readable(plan, {"train"}, {"train"})


def test_what_was_made_before_is_not_what_will_be_made_anew(data, tmp_path):
    """Its classes may be others then."""
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    plan = read(tmp_path, SHARDS + train('train = "{shards}", val = "set"'))
    made = plan.stages[0].folder
    made.mkdir(parents=True)
    shutil.copytree(data / "other", made / "data")
    check(plan)
    (made / "result.json").write_text(json.dumps({"digest": plan.stages[0].digest}))
    with pytest.raises(UserError, match=r"data\.val: .*other classes"):
        check(plan)
    shutil.rmtree(made / "data")
    with pytest.raises(
        UserError, match=r"data\.train: stage shards made \S+data, which is gone; .*, move away \S+/stages/shards$"
    ):
        check(plan)
    made.rename(made.with_name("away"))
    check(plan)


def test_of_a_remote_data_set_the_manifest_is_read_alone_and_one_that_does_not_answer_is_a_warning(data, capsys):
    with serve_faults(data / "set") as server:
        plan = read(data, train(f'train = "{server.url}"'))
        check(plan)
        assert server.paths
        assert not [each for each in server.paths if ".tar" in each]
        with pytest.raises(UserError, match=r"data\.train: no data set at http\S+/none"):
            check(read(data, train(f'train = "{server.url}/none"')))
    gone = train('train = "http://127.0.0.1:9/none"')
    check(read(data, gone + gone.replace('"train"\n', '"again"\n')))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1  # of both
    assert told[0].startswith("warning: stage train, data.train, could not be looked at: cannot read http://127.0.0.1")


def test_a_data_set_of_many_runs_is_opened_once(data, monkeypatch):
    opened = []

    def counted(source: TrainSource, store: StoreSettings) -> Dataset:
        opened.append(source.url)
        return _open(source, store)

    monkeypatch.setattr("launch.readable._open", counted)
    check(
        read(
            data, train('train = "set"').replace("[stage.set]", 'sweep = { "optim.lr" = [0.1, 0.2, 0.3] }\n[stage.set]')
        )
    )
    assert opened == [str(data / "set")]


@pytest.mark.long
def test_each_command_that_checks_a_plan_tells_it(data):
    read(data, train('train = "set", val = "other"') + stage("figures", 'weights = "set"'))
    for command in (["run", "plan.toml"], ["run", "plan.toml", "--dry-run"], ["submit", "plan.toml"]):
        told = refused(patchmill(*command, cwd=data))
        assert told.startswith("error: stage train of plan.toml, data.val: ") or command[0] == "submit"
        assert "other has other classes than" in told
    done = patchmill("doctor", "plan.toml", "--json", cwd=data)
    assert done.returncode == 2
    found = {each["what"]: each["told"] for each in json.loads(done.stdout) if each["state"] == "error"}
    assert found.keys() >= {"train: data.val", "last: weights"}
    assert len(list(misfits(read_plan(data / "plan.toml", data / "runs"), {"train", "last"}))) == 2
