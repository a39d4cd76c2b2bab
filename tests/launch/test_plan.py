import os
import shutil
import textwrap
from pathlib import Path

import pytest

from launch.inputs import Inputs
from launch.plan import read_plan
from shards.atomic import only_one
from shards.errors import UserError
from tests.images import make_image_folder

HEAD = 'name = "x"\n'
SHARDS = '[[stage]]\nname = "shards"\nkind = "shards"\nset = { source = "images", split = { val = 0.2 } }\n'
PRETRAIN = """
[[stage]]
name = "pretrain"
kind = "supervised"
recipe = "small_pretrain"
ranks = 2
[stage.set]
data = { train = "{shards}/train", val = "{shards}/val" }
"""
EVALUATE = '[[stage]]\nname = "e"\nkind = "evaluate"\nset = { weights = "{convert}", data = "{shards}/val", MORE }\n'
FEWSHOT = EVALUATE.replace("evaluate", "fewshot").replace("data", 'train = "{shards}/train", test')
CONVERT = '[[stage]]\nname = "convert"\nkind = "convert"\nset = { source = "{pretrain}" }\n'
CHAIN = HEAD + SHARDS + PRETRAIN + CONVERT


@pytest.fixture
def write(tmp_path):
    make_image_folder(tmp_path / "images", per_class=2)

    def written(text: str) -> Path:
        path = tmp_path / "plan.toml"
        path.write_text(textwrap.dedent(text))
        return path

    return written


def test_stages_come_in_the_order_of_their_needs(write, tmp_path):
    plan = read_plan(write(HEAD + CONVERT + PRETRAIN + SHARDS), tmp_path / "runs")
    assert [stage.table.name for stage in plan.stages] == ["shards", "pretrain", "convert"]
    shards, pretrain, convert = plan.stages
    stages = tmp_path / "runs" / "x" / "stages"
    assert pretrain.settings.data.train == f"{stages}/shards/data/train"
    assert pretrain.settings.global_batch == 64  # from the recipe
    assert pretrain.arguments == ["train", f"{stages}/pretrain/config.toml", "--out", f"{stages}/pretrain"]
    assert convert.arguments[:3] == ["convert", f"{stages}/pretrain", f"{stages}/convert/model.safetensors"]
    assert shards.arguments[:2] == ["shards", "build"]


def test_a_conversion_to_another_format_is_what_the_next_stage_takes(write, tmp_path):
    more = 'to = "transformers", image_size = 32, classes = 3, dtype = "bfloat16", '
    more += 'set = { gelu = "exact", num_heads = 3 } }'
    text = HEAD + SHARDS + PRETRAIN + CONVERT.replace(" }", ", " + more)
    text += '[[stage]]\nname = "e"\nkind = "evaluate"\nset = { weights = "{convert}", data = "{shards}/train" }\n'
    stages = {stage.table.name: stage for stage in read_plan(write(text), tmp_path / "runs").stages}
    made = str(stages["convert"].folder / "model")
    assert stages["e"].settings.weights == made
    arguments = " ".join(stages["convert"].arguments)
    assert f"{made} --checkpoint latest --to transformers --resize official --dtype bfloat16" in arguments
    assert arguments.endswith('--image-size 32 --classes 3 --set gelu="exact" --set num_heads=3')


def test_a_digest_follows_settings_inputs_and_images_but_not_ranks(write, tmp_path):
    def digests(text: str) -> list[str]:
        return [stage.digest for stage in read_plan(write(text), tmp_path / "runs").stages]

    before = digests(HEAD + SHARDS + PRETRAIN + CONVERT)
    assert digests(HEAD + SHARDS + PRETRAIN.replace("ranks = 2", "ranks = 1") + CONVERT) == before
    changed = digests(HEAD + SHARDS + PRETRAIN + "[stage.set.optim]\nlr = 0.5\n" + CONVERT)
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, False]
    with only_one(tmp_path / "images", "build"):  # which may write there just now
        (tmp_path / "images" / ".build").mkdir()
        (tmp_path / "images" / ".build" / "plan").touch()
        assert digests(HEAD + SHARDS + PRETRAIN + CONVERT) == before
    (tmp_path / "images" / "red" / "000.png").unlink()
    assert not set(before) & set(digests(HEAD + SHARDS + PRETRAIN + CONVERT))


def test_a_file_is_known_by_what_it_holds_and_a_folder_by_names_sizes_and_times(tmp_path, monkeypatch):
    weights, folder = tmp_path / "weights.npz", tmp_path / "folder"
    weights.write_bytes(bytes(1 << 21))
    folder.mkdir()
    (folder / "0.png").write_bytes(b"0")

    def digests(*paths: Path) -> list[str]:
        return [Inputs(tmp_path).digest(path) for path in paths]

    before = digests(weights, folder)
    copy = shutil.copy(weights, tmp_path / "copy.npz")
    for path in (weights, folder / "0.png"):
        os.utime(path, ns=(1, 1))
    assert digests(weights, copy) == [before[0], before[0]]
    assert digests(folder) != before[1:]
    weights.write_bytes(bytes((1 << 21) - 1) + b"1")
    os.utime(weights, ns=(1, 1))
    assert digests(weights) != before[:1]
    monkeypatch.setattr("launch.inputs.READ", 1 << 20)  # as of one of more than 4 GiB
    large = digests(weights)
    os.utime(weights, ns=(2, 2))
    assert digests(weights) != large


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    with pytest.raises(UserError, match=r"/proc/self/mem cannot be read: Input/output error; mend that, or name"):
        Inputs(tmp_path).digest(Path("/proc/self/mem"))


STREAM = """
[[stage]]
name = "stream"
kind = "supervised"
recipe = "small_pretrain"
set = { duration = "10 steps", data = { train = "SOURCE", val = "images", allow_pipe = true } }
"""


def test_a_stage_may_train_on_a_stream(write, tmp_path):
    def stage(source: str):
        return read_plan(write(HEAD + STREAM.replace("SOURCE", source)), tmp_path / "runs").stages[0]

    for number in range(2):
        (tmp_path / f"x-{number}.tar").write_bytes(bytes(1024))
    before = stage("x-{0..1}.tar")
    assert before.settings.data.train == f"{tmp_path}/x-{{0..1}}.tar"
    assert stage("x-{0..1}.tar").digest == before.digest != stage("x-*.tar").digest
    (tmp_path / "x-1.tar").write_bytes(bytes(2048))
    assert stage("x-{0..1}.tar").digest != before.digest
    for source in ("pipe:cat {0..9}.tar", "https://host/{0..9}.tar"):
        assert stage(source).settings.data.train == source
    with pytest.raises(UserError, match="standard input comes once, and a plan may run again"):
        stage("-")
    with pytest.raises(UserError, match="does not tell its classes; set data"):
        read_plan(write((HEAD + STREAM).replace("SOURCE", "x-*.tar").replace('val = "images", ', "")))
    with pytest.raises(UserError, match=r"no object .*missing.tar"):
        stage("missing.tar")


MIXED = """
[[stage]]
name = "pretrain"
kind = "supervised"
recipe = "small_pretrain"
[stage.set.data]
val = "{shards}/val"
[[stage.set.data.train]]
url = "{shards}/train"
weight = 3
[[stage.set.data.train]]
url = "drawings"
weight = 1
exclude = "v1"
"""


def test_every_source_of_a_mixture_is_an_input(write, tmp_path):
    drawings = tmp_path / "drawings"
    (drawings / "manifest" / "exclude").mkdir(parents=True)
    (drawings / "manifest" / "dataset.json").write_text("{}")

    def pretrain(text: str = MIXED):
        return read_plan(write(HEAD + SHARDS + text), tmp_path / "runs").stages[1]

    before = pretrain()
    assert before.needs == ["shards"]
    first, second = before.settings.data.train
    assert (first.url, first.weight) == (f"{tmp_path}/runs/x/stages/shards/data/train", 3)
    assert (second.url, second.weight, second.exclude) == (str(drawings), 1, "v1")
    other = pretrain(MIXED.replace("weight = 3", "weight = 2"))
    assert other.digest != before.digest
    assert other.inputs == before.inputs  # so it goes on in place, and the loader refuses the weights
    assert pretrain(MIXED.replace('"v1"', '"v2"')).digest != before.digest
    (drawings / "manifest" / "exclude" / "v2.parquet").write_bytes(b"written while the stage runs")
    assert pretrain().inputs == before.inputs
    (drawings / "manifest" / "dataset.json").write_text("{ }")
    assert pretrain().inputs != before.inputs
    for text, message in [
        (MIXED.replace("{shards}/train", "{shards}/trian"), "makes no {shards}/trian; it makes"),
        (MIXED.replace("drawings", "drawing"), r"there is no .*drawing \(url\); mend the path"),
        (MIXED.replace("weight = 1", "wight = 1"), r"unknown setting data\.train\.1\.wight .*did you mean 'weight'"),
        (MIXED.replace('url = "drawings"', ""), r"setting data\.train\.1\.url is missing"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrain(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHARDS, "setting name is missing"),
        ('name = "x"', "setting stage is missing"),
        (HEAD + SHARDS + SHARDS, "two stages of .* are named 'shards'"),
        (HEAD + SHARDS.replace('kind = "shards"', 'kind = "shard"'), "did you mean 'shards'"),
        (HEAD + SHARDS + CONVERT, "convert .* needs stage 'pretrain', which is not there"),
        (HEAD + SHARDS + PRETRAIN + "[stage.set.optim]\nrate = 1.0\n", "unknown setting optim.rate in stage pretrain"),
        (HEAD + SHARDS + PRETRAIN.replace("= 2", "= 3"), "64 does not divide over 3 ranks; set it to 63 or 66"),
        (HEAD + SHARDS.replace('"images"', '"nowhere"'), "there is no .*nowhere .source.; mend the path"),
        (HEAD + SHARDS.replace("set =", 'after = ["shards"]\nset ='), "wait for each other: shards -> shards"),
        (HEAD + SHARDS + PRETRAIN.replace("{shards}/train", "{shards}/trian"), "makes no {shards}/trian; it makes"),
        (HEAD + SHARDS + PRETRAIN + "resolution = 20\n", "unknown setting resolution"),
        (HEAD + SHARDS + PRETRAIN.replace("/val", "/val\", resolution = 20, augment = \"resize"), "resolution 20 is"),
        (HEAD + SHARDS.replace("kind", "recpie = 'a'\nkind"), "unknown setting stage.0.recpie .*did you mean 'recipe'"),
        (HEAD + SHARDS + PRETRAIN.replace("small_pretrain", "big"), "there is no recipe 'big'"),
        (HEAD + SHARDS + CONVERT.replace("pretrain", "shards").replace("set", 'init = "shards"\nset'), "no init"),
        (CHAIN + EVALUATE.replace("MORE", "short = 512"), "short = 512 is of view center_crop, and the view is resize"),
        (CHAIN + FEWSHOT.replace("MORE", "shots = [0, 5]"), "setting shots.0 = 0 in stage e of .* greater than 0"),
        (CHAIN + FEWSHOT.replace("MORE", "shots = []"), r"setting shots = \[\] in stage e of .* at least 1 item"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_anything_starts(write, tmp_path, text, message):
    with pytest.raises(UserError, match=message) as raised:
        read_plan(write(text), tmp_path / "runs")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_a_smoke_run_is_in_a_folder_of_its_own_and_shrinks_every_training_stage(write, tmp_path):
    full = read_plan(write(HEAD + SHARDS + PRETRAIN + CONVERT), tmp_path / "runs")
    small = read_plan(write(HEAD + SHARDS + PRETRAIN + CONVERT), tmp_path / "runs", smoke=True)
    assert small.run == tmp_path / "runs" / "x-smoke"
    for before, after in zip(full.stages, small.stages, strict=True):
        there = [text.replace("/runs/x/", "/runs/x-smoke/") for text in before.arguments]
        assert after.arguments == there + (["--smoke"] if before.table.name == "pretrain" else [])


def test_a_recipe_of_another_kind_is_refused(write, tmp_path):
    with pytest.raises(UserError, match=r"stage pretrain of .* is of kind supervised, its settings of kind finetune"):
        read_plan(write(HEAD + SHARDS + PRETRAIN.replace("small_pretrain", "small_finetune")), tmp_path / "runs")


def test_a_recipe_may_be_a_file_beside_the_plan(write, tmp_path):
    (tmp_path / "mine.toml").write_text(
        'kind = "supervised"\nglobal_batch = 24\nduration = "3 epochs"\nmodel.name = "vit_s16"\n'
    )
    by_file = PRETRAIN.replace("small_pretrain", "mine.toml").replace("val = ", "resolution = 64, val = ")
    settings = read_plan(write(HEAD + SHARDS + by_file), tmp_path / "runs").stages[1].settings
    assert (settings.global_batch, settings.model.name, settings.data.resolution) == (24, "vit_s16", 64)
    with pytest.raises(UserError, match=r"there is no settings file .*/its.toml"):
        read_plan(write(HEAD + SHARDS + PRETRAIN.replace("small_pretrain", "its.toml")), tmp_path / "runs")
